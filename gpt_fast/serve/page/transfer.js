/** Conversations as a file, and back. Pure. What is read was written by anybody, so all of it is checked. */

const FORMAT = "gpt-fast-conversations";
const ID = /^[0-9a-f]{24}$/;
const NUMBERS = ["first", "rate", "tokens", "thought"];
const TEXTS = ["reasoning", "model", "end", "error"];

export function exported(conversations) {
  return JSON.stringify({ format: FORMAT, version: 1, conversations }, null, 1);
}

/** The conversations of a file's text. Throws an Error of one line. */
export function imported(text) {
  let value;
  try {
    value = JSON.parse(text);
  } catch {
    throw new Error("import: not JSON");
  }
  if (value?.format !== FORMAT || value.version !== 1 || !Array.isArray(value.conversations))
    throw new Error(`import: not exported by this page (got format ${JSON.stringify(value?.format)}, allowed "${FORMAT}")`);
  return value.conversations.map(conversation);
}

function conversation(value, index) {
  const where = `import: conversation ${index + 1}`;
  if (!ID.test(value?.id) || !Array.isArray(value.nodes)) throw new Error(`${where}: no id or no messages`);
  const known = new Set();
  const nodes = value.nodes.map((node) => message(node, known, where));
  const chosen = Object.fromEntries(
    Object.entries(value.chosen ?? {}).filter(([parent, child]) => (parent === "root" || known.has(parent)) && known.has(child)),
  );
  return { id: value.id, created: Number(value.created) || 0, changed: Number(value.changed) || 0, nodes, chosen };
}

/** A message whose parent came before it: so there is no circle. */
function message(node, known, where) {
  const fits = ID.test(node?.id) && !known.has(node.id) && (node.parent === null || known.has(node.parent));
  if (!fits || !["user", "assistant"].includes(node.role) || typeof node.content !== "string")
    throw new Error(`${where}: a message without an id, a parent before it, a role or text`);
  known.add(node.id);
  const kept = { id: node.id, parent: node.parent, role: node.role, content: node.content };
  for (const name of TEXTS) if (typeof node[name] === "string") kept[name] = node[name];
  for (const name of NUMBERS) if (Number.isFinite(node[name])) kept[name] = node[name];
  return kept;
}
