"""What pyproject.toml asks for is used, and what messages and pages tell users to install is what it asks for."""

from __future__ import annotations

import ast
import re
import tomllib

import pytest

from support.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SOURCES = [ROOT / "handler.py", *(ROOT / "gpt_fast").rglob("*.py"), *(ROOT / "scripts").glob("*.py")]
PAGES = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
IMPORTED_AS = {"pyyaml": "yaml"}
ADVICE = re.compile(r"pip install\s+(?:'([^']+)'|([\w.=-]+))")


def name_of(requirement: str) -> str:
    return re.split(r"[<>=;\[ ]", requirement)[0]


@pytest.mark.slow
@pytest.mark.parametrize("requirement", PROJECT["dependencies"])
def test_every_dependency_is_imported(requirement: str) -> None:
    name = IMPORTED_AS.get(name_of(requirement), name_of(requirement))
    nodes = [node for path in SOURCES for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    imported = {alias.name.split(".")[0] for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {(node.module or "").split(".")[0] for node in nodes if isinstance(node, ast.ImportFrom)}
    assert name in imported


def test_what_users_are_told_to_install_can_be_installed() -> None:
    """No index has this package; of what its extras name, the version is theirs."""
    extras = {name_of(one): one for extra in PROJECT["optional-dependencies"].values() for one in extra}
    told = [
        (path.name, quoted or bare, bool(quoted) or "==" in bare)
        for path in (*SOURCES, *PAGES)
        for quoted, bare in ADVICE.findall(path.read_text(encoding="utf-8"))
    ]
    assert len(told) > 3
    for page, package, versioned in told:
        assert name_of(package) != PROJECT["name"], page
        assert not versioned or package == extras[name_of(package)], page


def test_advice_is_found() -> None:
    assert ADVICE.findall("pip install 'a>=1' or pip install b==2 `pip install c[d]`") == [
        ("a>=1", ""),
        ("", "b==2"),
        ("", "c"),
    ]
