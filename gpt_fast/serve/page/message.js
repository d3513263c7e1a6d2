/** How a message looks: its text, what can be done with it, and an answer's reasoning, figures and shortfall. */
import { figures, shortfall } from "./answer.js";
import { copyButton } from "./copy.js";
import { element } from "./dom.js";
import { Markdown } from "./markdown.js";

const button = (text, label, onclick, more = {}) =>
  element("button", { type: "button", onclick, "aria-label": label, ...more }, text);

/** "‹ 2/3 ›", where there is something to choose. */
function arrows({ all, index }, choose) {
  if (all.length < 2) return null;
  const go = (text, label, to) => button(text, label, () => choose(all[to]), { disabled: !all[to] });
  const place = element("span", { "aria-label": `version ${index + 1} of ${all.length}` }, `${index + 1}/${all.length}`);
  return element("span", { class: "versions" }, go("‹", "Earlier version", index - 1), place, go("›", "Later version", index + 1));
}

/** What was asked. actions: choose(node), edit(node, text). */
export function questionView(node, versions, actions) {
  const text = element("div", { class: "text plain" }, node.content);
  const row = element("div", { class: "actions" }, arrows(versions, actions.choose), copyButton(() => node.content, "Copy message"));
  const article = element("article", { class: "message user", "aria-label": "You", tabindex: "-1" }, text, row);
  row.append(button("Edit", "Edit message", () => edit(article, node, actions)));
  return article;
}

function edit(article, node, actions) {
  const area = element("textarea", { "aria-label": "Edited message", rows: Math.min(node.content.split("\n").length + 1, 12) });
  area.value = node.content;
  const kept = [...article.childNodes];
  const close = () => {
    article.replaceChildren(...kept);
    article.querySelector("[aria-label='Edit message']").focus();
  };
  const form = element(
    "form",
    { class: "edit", onsubmit: (event) => (event.preventDefault(), area.value.trim() && actions.edit(node, area.value.trim())) },
    area,
    element("div", { class: "actions" }, element("button", { class: "primary" }, "Send"), button("Cancel", "Cancel editing", close)),
  );
  form.addEventListener("keydown", (event) => {
    if (event.key === "Escape") close();
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) (event.preventDefault(), form.requestSubmit());
  });
  article.replaceChildren(form);
  area.focus();
}

/** An answer, which may still grow: `update` draws what is new, at most once a frame. */
export class AnswerView {
  /** actions: choose(node), again(node). */
  constructor(node, versions, actions) {
    this.node = node;
    this.article = element("article", { class: "message assistant", "aria-label": "Answer", tabindex: "-1" });
    this.summary = element("summary");
    this.thoughts = element("div", { class: "text" });
    this.thinking = element("details", { class: "thinking" }, this.summary, this.thoughts);
    this.text = element("div", { class: "text" });
    this.note = element("p", { class: "note" });
    this.figures = element("span", { class: "figures" });
    this.row = element(
      "div",
      { class: "actions" },
      arrows(versions, actions.choose),
      copyButton(() => node.content, "Copy answer"),
      button("Regenerate", "Answer again", () => actions.again(node)),
      this.figures,
    );
    this.article.append(this.thinking, this.text, this.note, this.row);
    this.drawing = { thoughts: new Markdown(this.thoughts), text: new Markdown(this.text) };
    this.frame = 0;
  }

  update() {
    this.frame ||= requestAnimationFrame(() => this.draw({ whole: false }));
  }

  /** The answer is complete. */
  finish() {
    cancelAnimationFrame(this.frame);
    this.draw({ whole: true });
  }

  draw({ whole }) {
    this.frame = 0;
    const { reasoning = "", content, thought = 0, end } = this.node;
    this.article.setAttribute("aria-busy", String(!whole)); // screen readers wait, and read the answer once
    this.thinking.hidden = !reasoning;
    if (reasoning) this.drawing.thoughts.draw(reasoning, { whole });
    this.summary.textContent = whole || content ? `Thought for ${thought.toFixed(1)} s` : `Thinking… ${thought.toFixed(0)} s`;
    this.drawing.text.draw(content, { whole });
    this.note.textContent = whole ? shortfall(this.node) : "";
    this.note.className = end === "failed" || end === "error" ? "note error" : "note";
    this.note.hidden = !this.note.textContent;
    this.figures.textContent = figures(this.node);
    this.row.hidden = !whole && !this.figures.textContent;
    for (const control of this.row.querySelectorAll("button")) control.hidden = !whole;
    this.row.querySelector(".copy").hidden ||= !content;
  }
}
