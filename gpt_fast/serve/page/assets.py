"""The chat page's files, by the paths that every door serves them at, and the policy that they run under.

The page is `chat`; its scripts and styles lie under `chat/DIGEST/`, where DIGEST is of all of them: a browser keeps
them for good and never mixes those of two versions. Text only, as TorchServe's answers are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import NamedTuple

PAGE = "chat"
# What the page runs, and how it looks, comes from files of its own server, never from within a page; it talks to that
# server alone and loads no picture from elsewhere. Markup is made by DOMPurify or not at all (Trusted Types).
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'; "
    "require-trusted-types-for 'script'; trusted-types dompurify"
)
SAFE = (("X-Content-Type-Options", "nosniff"), ("Referrer-Policy", "no-referrer"))
FOR_GOOD = ("Cache-Control", "public, max-age=31536000, immutable")
TYPES = {".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8"}
HTML = "text/html; charset=utf-8"


class Asset(NamedTuple):
    text: str
    content_type: str
    headers: tuple[tuple[str, str], ...]


def chat_page() -> Mapping[str, Asset]:
    """Path -> what is answered there."""
    folder = files("gpt_fast.serve.page")
    parts = dict(sorted(found(folder)))
    digest = hashlib.sha256("".join(f"{name}\0{text}\0" for name, text in parts.items()).encode()).hexdigest()[:16]
    html = (folder / "chat.html").read_text(encoding="utf-8").replace(f'"{PAGE}/', f'"{PAGE}/{digest}/')
    page = {PAGE: Asset(html, HTML, (("Content-Security-Policy", POLICY), ("Cache-Control", "no-cache"), *SAFE))}
    for name, text in parts.items():
        asset = Asset(text, TYPES[name[name.rindex(".") :]], (FOR_GOOD, *SAFE))
        page[f"{PAGE}/{digest}/{name}"] = asset
        page[f"{PAGE}/{PAGE}/{digest}/{name}"] = asset  # where a browser that came to "chat/" looks
    return page


def is_of_page(path: str) -> bool:
    """Whether a path, without slashes around it, is the page's or one of its files'. They hold nothing secret."""
    return path == PAGE or path.startswith(f"{PAGE}/")


def found(folder: Traversable, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Name below the package -> text, of all scripts and styles."""
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from found(entry, f"{prefix}{entry.name}/")
        elif entry.name.endswith(tuple(TYPES)):
            yield prefix + entry.name, entry.read_text(encoding="utf-8")
