/** Whether the server answers, told in the header; while it does not, it is asked again until it does. */
import { Refused, model } from "./api.js";

const AGAIN_MS = 2000;

export class ServerState {
  /** node: where it is told. token(): the key of the moment. asksForKey(): called when the server wants one. */
  constructor(node, token, asksForKey) {
    Object.assign(this, { node, token, asksForKey, timer: 0 });
  }

  async look() {
    clearTimeout(this.timer);
    try {
      this.tell(await model(this.token()), "here");
    } catch (error) {
      if (error instanceof Refused && error.asksForKey) {
        this.tell("The server asks for its key: see Settings", "refuses");
        return this.asksForKey();
      }
      const why = error instanceof Refused ? error.message : "The server does not answer";
      this.tell(`${why}; trying again`, "gone");
      this.timer = setTimeout(() => this.look(), AGAIN_MS);
    }
  }

  /** The same words are not told again: screen readers would say them every time. */
  tell(text, state) {
    if (this.node.textContent !== text) this.node.textContent = text;
    this.node.dataset.state = state;
  }
}
