"""Pages in a headless Chromium: opened, watched for what no page of ours may do, and pictured.

Set GPT_FAST_SCREENSHOTS to a folder to keep the pictures; else they go with the test's own folder.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NEEDS_CHROMIUM = [
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


@contextmanager
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS, headless=True)
        yield browser
        browser.close()


class Tabs:
    """Opens pages, and holds them to talk to nobody but their own server, to fail nowhere and to open no dialog."""

    def __init__(self, browser: Any, pictures: Path) -> None:
        self.browser, self.pictures = browser, Path(os.environ.get("GPT_FAST_SCREENSHOTS") or pictures)
        self.contexts: list[Any] = []
        self.wrongs: list[str] = []

    def open(
        self, url: str, *, width: int = 1200, height: int = 800, colors: str = "light", context: Any = None
    ) -> Any:
        """A page, in a profile of its own unless one is given."""
        if context is None:
            context = self.browser.new_context(viewport={"width": width, "height": height}, color_scheme=colors)
            self.contexts.append(context)
        page = context.new_page()
        origin = "/".join(url.split("/")[:3])
        page.on("request", lambda request: self.look(request.url, (origin, "data:", "blob:")))
        page.on("pageerror", lambda error: self.wrongs.append(f"error: {error}"))
        page.on("console", self.listen)
        page.goto(url)
        return page

    def look(self, url: str, allowed: tuple[str, ...]) -> None:
        if not url.startswith(allowed):
            self.wrongs.append(f"asked {url}")

    def listen(self, message: Any) -> None:
        """A policy that stopped something says so here."""
        if "Content Security Policy" in message.text or "TrustedHTML" in message.text:
            self.wrongs.append(message.text)

    def picture(self, page: Any, name: str) -> None:
        self.pictures.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=str(self.pictures / f"{name}.png"))

    def close(self) -> None:
        for context in self.contexts:
            context.close()


def module(page: Any, name: str) -> Any:
    """A handle to one of the chat page's modules."""
    return page.evaluate_handle("name => import(new URL(name, document.querySelector('script').src))", name)
