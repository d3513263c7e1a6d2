/**
 * A conversation is a tree: what is edited or answered again gets a sibling, and nothing is lost. Pure.
 *
 * conversation: {id, created, changed, nodes: [message...], chosen: {parent's id or "root": child's id}}
 * message: {id, parent: id or null, role, content} and what answer.js knows of an answer
 */

export function newId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

export function newConversation(now = Date.now()) {
  return { id: newId(), created: now, changed: now, nodes: [], chosen: {} };
}

/** The messages that follow a message (null: that begin the conversation), oldest first. */
export function children(conversation, parent) {
  return conversation.nodes.filter((node) => node.parent === parent);
}

/** Adds a message below another and makes it the one that is shown. */
export function add(conversation, parent, message) {
  const node = { ...message, id: newId(), parent };
  conversation.nodes.push(node);
  choose(conversation, node);
  return node;
}

export function choose(conversation, node) {
  conversation.chosen[node.parent ?? "root"] = node.id;
}

/** The messages that are shown: from the first one, each time the chosen one of those that follow. */
export function shown(conversation) {
  const path = [];
  for (let parent = null; ; parent = path.at(-1).id) {
    const next = children(conversation, parent);
    if (!next.length) return path;
    path.push(next.find((node) => node.id === conversation.chosen[parent ?? "root"]) ?? next.at(-1));
  }
}

/** The messages from the first one to this. */
export function upTo(conversation, node) {
  const path = [];
  for (let at = node; at; at = conversation.nodes.find((other) => other.id === at.parent)) path.unshift(at);
  return path;
}

/** What a message can be exchanged for, itself included, and where in it the message is. */
export function alternatives(conversation, node) {
  const all = children(conversation, node.parent);
  return { all, index: all.indexOf(node) };
}

export function title(conversation) {
  const first = shown(conversation)[0];
  return first ? first.content.trim().split("\n")[0].slice(0, 80) : "New chat";
}
