/** The list of conversations: open, delete, export, import. */
import { byId, element } from "./dom.js";
import * as store from "./store.js";
import { exported, imported } from "./transfer.js";
import { title } from "./tree.js";

export class History {
  /** open(id or null): shows another conversation. tell(text): says what went wrong. */
  constructor({ open, tell }) {
    this.open = open;
    this.tell = tell;
    this.removed = new Set(); // ids: an answer that still ends must not bring its conversation back
    byId("new").addEventListener("click", () => open(null));
    byId("export").addEventListener("click", () => this.guarded(() => this.export()));
    byId("import").addEventListener("click", () => byId("file").click());
    byId("file").addEventListener("change", () => this.guarded(() => this.import()));
  }

  async guarded(action) {
    try {
      return await action();
    } catch (error) {
      this.tell(error?.name === "Error" ? error.message : "This browser keeps no conversations");
    }
  }

  /** Draws the list; current: the id of the conversation that is open. */
  show(current) {
    return this.guarded(async () => {
      const rows = (await store.list()).map((conversation) => this.row(conversation, conversation.id === current));
      byId("conversations").replaceChildren(...rows);
    });
  }

  row(conversation, current) {
    const name = title(conversation);
    const link = element("a", { href: `#${conversation.id}`, "aria-current": current ? "page" : null, title: name }, name);
    const remove = element("button", { type: "button", "aria-label": `Delete ${name}`, onclick: () => this.remove(conversation, current) }, "×");
    return element("li", {}, link, remove);
  }

  save(conversation) {
    if (this.removed.has(conversation.id)) return undefined;
    return this.guarded(() => store.save(conversation));
  }

  load(id) {
    return this.guarded(() => store.load(id));
  }

  remove(conversation, current) {
    if (!confirm(`Delete “${title(conversation)}”?`)) return;
    this.removed.add(conversation.id);
    this.guarded(async () => {
      await store.remove(conversation.id);
      this.open(current ? null : undefined);
    });
  }

  async export() {
    const file = new Blob([exported(await store.list())], { type: "application/json" });
    const link = element("a", { href: URL.createObjectURL(file), download: "conversations.json" });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
  }

  /** Of a conversation that is here already, the one that changed last stays. */
  async import() {
    const [file] = byId("file").files;
    byId("file").value = "";
    if (!file) return;
    const here = new Map((await store.list()).map((conversation) => [conversation.id, conversation.changed]));
    const newer = imported(await file.text()).filter(({ id, changed }) => !(here.get(id) >= changed));
    for (const conversation of newer) {
      this.removed.delete(conversation.id);
      await store.save(conversation);
    }
    this.open(undefined);
    this.tell(`${newer.length} imported`);
  }
}
