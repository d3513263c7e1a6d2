/** The page: puts its parts together, and plays a conversation. */
import { receive } from "./answer.js";
import { byId, toggles } from "./dom.js";
import { Follow } from "./follow.js";
import { History } from "./history.js";
import { AnswerView, questionView } from "./message.js";
import { ServerState } from "./server_state.js";
import { Settings } from "./settings.js";
import { add, alternatives, choose, newConversation, shown, upTo } from "./tree.js";

const SAVE_MS = 1000; // how much of a running answer a closed page may lose

class Chat {
  constructor() {
    this.settings = new Settings(byId("settings"));
    this.follow = new Follow(byId("scroller"), byId("log"), byId("latest"));
    this.history = new History({ open: (id) => this.open(id), tell: (text) => (byId("told").textContent = text) });
    const showSettings = toggles(byId("show-settings"), () => !byId("settings").hidden, (value) => (byId("settings").hidden = !value));
    this.server = new ServerState(byId("status"), () => this.settings.token, () => showSettings(true));
    this.running = null; // of the answer that streams: {node, view, controller}
    this.showHistory = toggles(
      byId("show-history"),
      () => document.body.classList.contains("with-history"),
      (value) => document.body.classList.toggle("with-history", value),
    );
    this.listen();
  }

  listen() {
    const input = byId("input");
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      if (this.running) this.stop();
      else this.send(input.value.trim());
    });
    input.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing || this.running) return;
      event.preventDefault();
      byId("composer").requestSubmit();
    });
    document.addEventListener("keydown", (event) => event.key === "Escape" && this.stop());
    byId("settings").elements.token.addEventListener("change", () => this.server.look());
    window.addEventListener("hashchange", () => this.openHash());
  }

  async start() {
    this.server.look();
    await this.openHash();
    byId("input").focus();
  }

  // ------------------------------------------------------------------------------------ which conversation

  /** id: that conversation; null: a new one; undefined: only the list has changed. */
  open(id) {
    if (id === undefined) return this.history.show(this.conversation.id);
    if (id === null) history.replaceState(null, "", location.pathname + location.search);
    else location.hash = id;
    if (id === null) return this.openHash().then(() => byId("input").focus());
  }

  async openHash() {
    const id = location.hash.slice(1);
    if (id && id === this.conversation?.id) return;
    this.stop();
    this.conversation = (id && (await this.history.load(id))) || newConversation();
    this.showHistory(false);
    this.show();
    this.follow.toEnd();
    await this.history.show(this.conversation.id);
  }

  save() {
    this.conversation.changed = Date.now();
    return this.history.save(this.conversation);
  }

  // ------------------------------------------------------------------------------------ what is shown

  show() {
    byId("log").replaceChildren(...shown(this.conversation).map((node) => this.view(node)));
  }

  view(node) {
    const versions = alternatives(this.conversation, node);
    if (node.role === "user") return questionView(node, versions, { choose: (other) => this.choose(other), edit: (...args) => this.edit(...args) });
    const view = new AnswerView(node, versions, { choose: (other) => this.choose(other), again: (other) => this.again(other) });
    if (this.running?.node === node) this.running.view = view;
    else view.finish();
    return view.article;
  }

  choose(node) {
    this.stop();
    choose(this.conversation, node);
    this.show();
    this.save();
  }

  // ------------------------------------------------------------------------------------ asking and answering

  /** Where nothing was answered, another question takes the place of the last one: no two stand in a row. */
  send(text) {
    if (!text) return;
    byId("input").value = "";
    const path = shown(this.conversation);
    const last = path.at(-1);
    const unanswered = last && !last.content ? path.at(-2) : last?.role === "user" ? last : null;
    this.ask(unanswered ? unanswered.parent : last?.id ?? null, text);
  }

  edit(node, text) {
    this.stop();
    this.ask(node.parent, text);
    byId("input").focus();
  }

  ask(parent, text) {
    this.answer(add(this.conversation, parent, { role: "user", content: text }));
  }

  /** Another answer to the same question, in place of one that has failed before it said anything. */
  again(node) {
    this.stop();
    const question = this.conversation.nodes.find((other) => other.id === node.parent);
    if (!node.content && !node.reasoning) this.conversation.nodes = this.conversation.nodes.filter((other) => other !== node);
    this.answer(question);
  }

  async answer(question) {
    const conversation = this.conversation; // another one may be open when this ends
    const messages = upTo(conversation, question).map(({ role, content }) => ({ role, content }));
    const node = add(conversation, question.id, { role: "assistant", content: "" });
    const running = (this.running = { node, view: null, controller: new AbortController() });
    byId("send").textContent = "Stop";
    this.show();
    this.follow.toEnd();
    location.hash = conversation.id;
    const keep = () => this.history.save({ ...conversation, changed: (conversation.changed = Date.now()) });
    await keep();
    this.history.show(conversation.id);
    const saving = setInterval(keep, SAVE_MS);
    try {
      await this.receive(node, messages, running);
    } finally {
      clearInterval(saving);
      if (this.running === running) this.ended();
      running.view.finish();
      await keep();
    }
  }

  async receive(node, messages, running) {
    let body;
    try {
      body = this.settings.request(messages);
    } catch (error) {
      return Object.assign(node, { end: "failed", error: error.message });
    }
    const options = { token: this.settings.token, signal: running.controller.signal, changed: () => running.view.update() };
    const failure = await receive(node, body, options);
    if (failure) this.server.look();
  }

  stop() {
    if (!this.running) return;
    this.running.node.end = "stopped";
    this.running.controller.abort();
    this.ended();
  }

  ended() {
    this.running = null;
    byId("send").textContent = "Send";
  }
}

new Chat().start();
