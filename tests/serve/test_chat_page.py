"""The chat page in headless Chromium, on a real server: streaming, stopping, errors, token, keyboard, narrow screens.

Set GPT_FAST_SCREENSHOTS to a folder to keep pictures of it.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpt_fast.serve.page import PageServer
from support.server import Server, new_server, shared_server

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.server,
    pytest.mark.model,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH"),
    pytest.mark.skipif(importlib.util.find_spec("playwright") is None, reason="no playwright: pip install playwright"),
]
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
]


@pytest.fixture(scope="module")
def server() -> Server:
    return shared_server()


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS, headless=True)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser) -> Iterator:
    """open_page(url, width=..., colors=...): the page; it must ask nobody but its own server for anything."""
    contexts, foreign, errors = [], [], []

    def open_it(url: str, *, width: int = 1200, colors: str = "light"):
        context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=colors)
        contexts.append(context)
        page = context.new_page()
        origin = "/".join(url.split("/")[:3])
        page.on("request", lambda request: request.url.startswith((origin, "data:")) or foreign.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(url)
        page.evaluate("document.getElementById('temperature').value = 0")
        return page

    yield open_it
    for context in contexts:
        context.close()
    assert not foreign and not errors


def picture(page, name: str) -> None:
    if folder := os.environ.get("GPT_FAST_SCREENSHOTS"):
        page.screenshot(path=str(Path(folder) / f"{name}.png"))


def finished(page) -> None:
    page.wait_for_selector("#send:text-is('Send')", timeout=60_000)


def ask(page, text: str) -> None:
    page.keyboard.type(text)
    page.keyboard.press("Enter")


def test_a_conversation_by_keyboard_alone(server, open_page):
    page = open_page(f"{server.url}/1.0/chat")
    picture(page, "empty")
    ask(page, "What is the capital of France?")
    page.wait_for_selector(".assistant", timeout=30_000)
    finished(page)
    assert page.inner_text(".assistant").strip()
    assert re.fullmatch(r"first token \d+ ms · [\d.]+ tokens/s · \d+ tokens", page.inner_text("#figures"))
    ask(page, "And of Italy?")  # the focus never left the message
    page.wait_for_selector(".assistant >> nth=1", timeout=30_000)
    finished(page)
    assert page.locator(".user").count() == page.locator(".assistant").count() == 2
    picture(page, "conversation")
    page.keyboard.press("Shift+Tab")  # backwards through the page: log, New chat, Settings
    page.keyboard.press("Shift+Tab")
    assert page.evaluate("document.activeElement.id") == "clear"
    page.keyboard.press("Enter")
    assert page.locator(".message").count() == 0


def test_settings_reach_the_server(server, open_page):
    page = open_page(f"{server.url}/1.0/chat")
    page.click("#toggle")
    assert page.get_attribute("#toggle", "aria-expanded") == "true"
    page.fill("#system", "You are a pirate.")
    page.fill("#temperature", "0")
    page.fill("#max_tokens", "7")
    page.fill("#seed", "3")
    with page.expect_request("**/v1/chat/completions") as caught:
        page.click("#input")
        ask(page, "Hello <b>you</b>")
    body = caught.value.post_data_json
    assert body["messages"][0] == {"role": "system", "content": "You are a pirate."}
    assert (body["temperature"], body["max_tokens"], body["seed"]) == (0, 7, 3)
    finished(page)
    assert page.inner_text(".user") == "Hello <b>you</b>"  # text, never markup
    assert int(re.search(r"(\d+) tokens$", page.inner_text("#figures"))[1]) <= 7
    picture(page, "settings")


def test_stop_frees_the_slot(server, open_page):
    page = open_page(f"{server.url}/1.0/chat")
    ask(page, "Write a very long story about the sea.")
    page.wait_for_selector(".assistant", timeout=30_000)
    server.wait_for(lambda figures: figures["num_requests_running"] == 1, seconds=5)
    assert page.inner_text("#send") == "Stop"
    picture(page, "running")
    page.keyboard.press("Escape")
    finished(page)
    server.wait_for(lambda figures: figures["num_requests_running"] == 0, seconds=5)
    assert page.locator(".error").count() == 0
    assert page.evaluate("document.activeElement.id") == "input"


def test_a_new_chat_starts_empty_while_an_answer_runs(server, open_page):
    page = open_page(f"{server.url}/1.0/chat")
    ask(page, "Write a very long story about the sea.")
    page.wait_for_selector(".assistant", timeout=30_000)
    page.click("#clear")
    finished(page)
    with page.expect_request("**/v1/chat/completions") as caught:
        page.click("#input")
        ask(page, "Hello")
    assert caught.value.post_data_json["messages"] == [{"role": "user", "content": "Hello"}]
    finished(page)


def test_an_error_is_shown_and_the_message_can_be_sent_again(server, open_page):
    page = open_page(f"{server.url}/1.0/chat")
    page.click("#toggle")
    page.fill("#top_p", "5")
    page.click("#input")
    ask(page, "Hello")
    page.wait_for_selector(".error", timeout=10_000)
    assert "top_p" in page.inner_text(".error")
    assert page.input_value("#input") == "Hello"  # what was refused is back where it was typed
    picture(page, "error")
    page.fill("#top_p", "0.9")
    page.click("#input")
    page.keyboard.press("Enter")
    page.wait_for_selector(".assistant", timeout=30_000)
    finished(page)
    assert page.locator(".user").count() == 1


@pytest.mark.parametrize("colors", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_nothing_overflows(server, open_page, width, colors):
    page = open_page(f"{server.url}/1.0/chat", width=width, colors=colors)
    page.click("#toggle")
    page.click("#input")
    page.fill("#max_tokens", "20")
    page.click("#input")
    ask(page, "Averyveryverylongwordthatdoesnotfitonaline" * 4)
    page.wait_for_selector(".assistant", timeout=30_000)
    finished(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for selector in ("#send", "#input", "#toggle", "#clear"):
        box = page.locator(selector).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= width and box["y"] + box["height"] <= 800
    picture(page, f"{width}-{colors}-settings")
    page.click("#toggle")
    picture(page, f"{width}-{colors}")


def test_with_the_token_on(open_page):
    server = new_server()
    try:
        server.start(token="on")
        pages = PageServer(server.origin, port=0)
        threading.Thread(target=pages.serve_forever, daemon=True).start()
        page = open_page(f"http://127.0.0.1:{pages.server_port}/chat")
        page.keyboard.type("What is the capital of France?")
        page.keyboard.press("Enter")
        page.wait_for_selector(".error", timeout=10_000)
        assert "token" in page.inner_text(".error").lower()
        picture(page, "token-missing")
        if not page.is_visible("#token"):
            page.click("#toggle")
        page.fill("#token", server.instance.token("inference") or "")
        page.click("#input")
        page.keyboard.press("Enter")
        page.wait_for_selector(".assistant", timeout=30_000)
        finished(page)
        assert page.inner_text(".assistant").strip()
        assert server.call({"prompt": "x"}).status == 400  # without the token nobody gets anything
        pages.shutdown()
    finally:
        server.stop()
