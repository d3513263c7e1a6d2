/**
 * A model's text as Markdown. Nobody vouches for what a model says, so there are three fences: HTML in it stays text,
 * DOMPurify keeps what is listed here, and the page's policy (assets.py) runs and loads nothing that gets past both.
 */
import { Marked } from "./vendor/marked.esm.js";
import hljs from "./vendor/highlight.min.js";
import "./vendor/purify.min.js";
import { copyButton } from "./copy.js";
import { element } from "./dom.js";
import { draw, formulas } from "./math.js";

const purify = globalThis.DOMPurify;
const RULES = {
  ALLOWED_TAGS: [
    ..."a blockquote br code del em h1 h2 h3 h4 h5 h6 hr li ol p pre span strong table tbody td th thead tr ul".split(" "),
    "#text",
  ],
  ALLOWED_ATTR: ["align", "class", "href", "start", "title"],
  ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i,
  ADD_URI_SAFE_ATTR: ["align", "start"],
  ALLOW_ARIA_ATTR: false,
  ALLOW_DATA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};
const OUR_CLASSES = /^(?:hljs|language|math)-[\w -]+$/;
const BREAK = /^<br\s*\/?>/i; // the one tag that models need: lines in a table
const ESCAPES = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;" };

const escaped = (text) => text.replace(/[&<>"']/g, (character) => ESCAPES[character]);

function highlighted(code, language) {
  return hljs.getLanguage(language) ? hljs.highlight(code, { language, ignoreIllegals: true }).value : escaped(code);
}

/** No HTML but line breaks: what looks like it is text, in which Markdown goes on. */
const tokenizer = {
  html: () => undefined,
  tag: (source) => BREAK.test(source) ? { type: "br", raw: BREAK.exec(source)[0] } : undefined,
};

const renderer = {
  code({ text, lang }) {
    const language = /^[\w+#.-]*/.exec(lang ?? "")[0].toLowerCase();
    const name = language ? ` class="language-${language.replace(/[^\w-]/g, "_")}" title="${escaped(language)}"` : "";
    return `<pre><code${name}>${highlighted(text, language)}</code></pre>`;
  },
  checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
  // A picture would tell another server that it was looked at; who wants to see it can follow the link.
  image: ({ href, text }) => `<a href="${escaped(href)}">${escaped(text || href)}</a>`,
};

const marked = new Marked({ gfm: true, breaks: true, tokenizer, renderer, extensions: formulas(escaped) });

purify.addHook("uponSanitizeAttribute", (node, data) => {
  if (data.attrName === "class" && !OUR_CLASSES.test(data.attrValue)) data.keepAttr = false;
});

/** HTML -> a fragment that is safe to show. */
export function safe(html) {
  return purify.sanitize(html, RULES);
}

function finish(fragment) {
  for (const link of fragment.querySelectorAll("a[href]")) {
    link.target = "_blank";
    link.rel = "noopener noreferrer nofollow";
  }
  for (const pre of fragment.querySelectorAll("pre")) {
    const bar = element("div", { class: "code-bar" }, element("span", {}, pre.firstChild?.title ?? ""));
    bar.append(copyButton(() => pre.textContent, "Copy code"));
    pre.firstChild?.removeAttribute?.("title");
    pre.setAttribute("tabindex", "0"); // long lines scroll, by keyboard too
    const box = element("div", { class: "code" }, bar);
    pre.replaceWith(box);
    box.append(pre);
  }
  for (const table of fragment.querySelectorAll("table")) {
    const box = element("div", { class: "table", tabindex: "0" });
    table.replaceWith(box);
    box.append(table);
  }
  draw(fragment);
  return fragment;
}

/** A text that grows, drawn below `node`: blocks that are finished stay as they are, and so does a selection in them. */
export class Markdown {
  constructor(node) {
    this.node = node;
    this.blocks = []; // {raw, nodes}
  }

  /** whole: the text is complete; all of it is drawn anew, for links that are defined at its end. */
  draw(text, { whole = false } = {}) {
    const tokens = marked.lexer(text);
    let same = 0;
    while (!whole && same < tokens.length && this.blocks[same]?.raw === tokens[same].raw) same += 1;
    for (const { nodes } of this.blocks.splice(same)) for (const node of nodes) node.remove();
    for (const token of tokens.slice(same)) {
      const nodes = [...finish(safe(marked.parser([token]))).childNodes];
      this.blocks.push({ raw: token.raw, nodes });
      this.node.append(...nodes);
    }
  }
}
