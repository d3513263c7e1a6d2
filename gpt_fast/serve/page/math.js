/** LaTeX in Markdown: $...$ and \(...\) in a line, $$...$$ and \[...\] apart; drawn as MathML, which browsers know. */
import "./vendor/katex.min.js";

const { katex } = globalThis;
// A dollar is a price unless it hugs its formula, as in pandoc: no space within, nothing like a word behind.
const INLINE = /^\$(?![\s$])((?:\\[^\n]|[^\\$\n])*?(?:\\[^\n]|[^\\$\s]))\$(?![\w$])|^\\\(([\s\S]+?)\\\)/;
const DISPLAY = /^\$\$([\s\S]+?)\$\$|^\\\[([\s\S]+?)\\\]/;
const BLOCK = /^(?:\$\$([\s\S]+?)\$\$|\\\[([\s\S]+?)\\\])[ \t]*(?:\n|$)/;
const OPTIONS = { output: "mathml", strict: "ignore", trust: refuse, maxSize: 50, maxExpand: 500 };

/** For links, pictures and HTML in a formula. */
function refuse({ command }) {
  throw new Error(`${command}: not in an answer`);
}

/** An extension of marked: `pattern` begins at a formula. */
function formula(name, level, pattern, start, display, escaped) {
  return {
    name,
    level,
    start: (source) => start.exec(source)?.index,
    tokenizer(source) {
      const match = pattern.exec(source);
      if (match) return { type: name, raw: match[0], text: (match[1] ?? match[2]).trim() };
    },
    renderer: ({ text }) => {
      const code = `<code class="math-${display ? "display" : "inline"}">${escaped(text)}</code>`;
      return level === "block" ? `<p>${code}</p>` : code;
    },
  };
}

/** What marked needs to find formulas; they become <code> of the source. escaped: text -> HTML. */
export function formulas(escaped) {
  return [
    formula("mathBlock", "block", BLOCK, /\$\$|\\\[/, true, escaped),
    formula("mathDisplay", "inline", DISPLAY, /\$\$|\\\[/, true, escaped),
    formula("mathInline", "inline", INLINE, /\$|\\\(/, false, escaped),
  ];
}

/** Draws the formulas below a node. What is no LaTeX stays as it was written. */
export function draw(node) {
  for (const code of node.querySelectorAll("code.math-inline, code.math-display")) {
    const displayMode = code.className === "math-display";
    const drawn = document.createElement("span");
    drawn.className = code.className;
    try {
      katex.render(code.textContent, drawn, { displayMode, ...OPTIONS });
      code.replaceWith(drawn);
    } catch (error) {
      code.title = error.message;
    }
  }
}
