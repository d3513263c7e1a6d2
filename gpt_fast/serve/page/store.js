/** Conversations in the browser's own database. Every function rejects where the browser keeps none. */

const STORE = "conversations";

function open() {
  return new Promise((resolve, reject) => {
    const request = indexedDB.open("gpt-fast", 1);
    request.onupgradeneeded = () => request.result.createObjectStore(STORE, { keyPath: "id" });
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

/** One transaction: `use` makes a request of the store; what it resulted in, once it is on disk. */
async function transact(mode, use) {
  const database = await open();
  try {
    return await new Promise((resolve, reject) => {
      const transaction = database.transaction(STORE, mode);
      const request = use(transaction.objectStore(STORE));
      transaction.oncomplete = () => resolve(request.result);
      transaction.onerror = transaction.onabort = () => reject(transaction.error);
    });
  } finally {
    database.close();
  }
}

/** All of them, the one that changed last first. */
export async function list() {
  const all = await transact("readonly", (store) => store.getAll());
  return all.sort((a, b) => b.changed - a.changed);
}

export const load = (id) => transact("readonly", (store) => store.get(id));
export const save = (conversation) => transact("readwrite", (store) => store.put(conversation));
export const remove = (id) => transact("readwrite", (store) => store.delete(id));
