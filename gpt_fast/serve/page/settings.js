/** The settings' form: kept in the browser, and as fields of a request. */

const KEY = "gpt-fast-settings";
const NUMBERS = ["temperature", "top_p", "top_k", "max_tokens", "seed"];
const SECRET = "token"; // as long as the tab is open, and no longer

export class Settings {
  constructor(form) {
    this.form = form;
    this.restore();
    form.addEventListener("input", () => this.keep());
    form.addEventListener("submit", (event) => event.preventDefault());
  }

  value(name) {
    return this.form.elements[name].value.trim();
  }

  get token() {
    return this.value(SECRET);
  }

  /** The fields of a request that answers these messages. Throws an Error of one line for JSON that is none. */
  request(messages) {
    const system = this.value("system");
    const body = {
      messages: [...(system ? [{ role: "system", content: system }] : []), ...messages],
      stream: true,
      stream_options: { include_usage: true, continuous_usage_stats: true },
    };
    for (const name of NUMBERS) if (this.value(name) !== "") body[name] = Number(this.value(name));
    return { ...body, ...this.furtherFields() };
  }

  furtherFields() {
    const text = this.value("fields");
    if (!text) return {};
    try {
      const value = JSON.parse(text);
      if (value !== null && typeof value === "object" && !Array.isArray(value)) return value;
    } catch {
      // told below
    }
    throw new Error('Further fields: not a JSON object (allowed as in {"stop": ["END"]})');
  }

  /** Storage that a browser refuses costs the convenience and nothing else. */
  keep() {
    const values = Object.fromEntries(new FormData(this.form));
    try {
      sessionStorage.setItem(KEY, values[SECRET]);
      delete values[SECRET];
      localStorage.setItem(KEY, JSON.stringify(values));
    } catch {
      // as said
    }
  }

  restore() {
    try {
      const values = { ...JSON.parse(localStorage.getItem(KEY) ?? "{}"), [SECRET]: sessionStorage.getItem(KEY) ?? "" };
      for (const [name, value] of Object.entries(values)) if (this.form.elements[name]) this.form.elements[name].value = value;
    } catch {
      // as said
    }
  }
}
