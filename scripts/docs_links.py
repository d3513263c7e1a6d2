"""The site's pages link to files of the repository beside docs/ (SECURITY.md, configs/): there, a path in plain type.

A hook of mkdocs (mkdocs.yml). A link to what is not in the repository stays, so that the strict build names it.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"\[([^\]]+)\]\(([^)\s#:]+)\)")


def on_page_markdown(markdown: str, *, page: Any, **_: object) -> str:
    return LINK.sub(lambda link: plain(link, page.file.src_uri), markdown)


def plain(link: re.Match[str], source: str) -> str:
    """The link as text where it leads out of docs/ to what is there; else as it was. source: the page, from docs/."""
    target = posixpath.normpath(posixpath.join("docs", posixpath.dirname(source), link[2]))
    if target.startswith("docs/") or not (ROOT / target).exists():
        return link[0]
    return f"{link[1]} (`{target}`)" if link[1] != target else f"`{target}`"
