"""Each message that docs/troubleshooting.md quotes is still one that the code says."""

from __future__ import annotations

import ast
import re

import pytest

from support.paths import ROOT

PAGE = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
MESSAGES = re.findall(r"^\| `([^`]+)` \|", PAGE, re.MULTILINE)


def texts() -> list[str]:
    """Every text of the code, an f-string's expressions as "...", neighbouring literals joined as Python joins them."""
    found = []
    for path in [*(ROOT / "gpt_fast").rglob("*.py"), *(ROOT / "scripts").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (str(part.value) if isinstance(part, ast.Constant) else "..." for part in node.values)
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


TEXTS = texts()


@pytest.mark.parametrize("message", MESSAGES)
def test_a_quoted_message_is_the_codes(message: str) -> None:
    """`...` of the page stands for anything."""
    pattern = re.compile(".*".join(re.escape(part.strip()) for part in message.split("...")), re.DOTALL)
    assert any(pattern.search(text) for text in TEXTS)


def test_messages_are_found() -> None:
    assert len(MESSAGES) > 25
