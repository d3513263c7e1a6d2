"""The wheel: what it holds, what it says of itself, and the page that an index would show."""

from __future__ import annotations

import email
import re
import subprocess
import sys
import zipfile
from email.message import Message
from pathlib import Path

import pytest

import gpt_fast
from support.paths import ROOT

PAGE = (ROOT / "PACKAGE.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """Built from the files that git knows, without a build environment, so without a network."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    wanted = [name for name in files.splitlines() if name.startswith(("gpt_fast/", "deploy/")) or "/" not in name]
    for name in wanted:
        if (ROOT / name).is_file():  # else deleted and not committed
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "-q", "--no-deps"]
    command += ["--no-build-isolation", "--wheel-dir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (path,) = out.iterdir()
    return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def metadata(wheel) -> Message:
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    return email.message_from_bytes(wheel.read(name))


@pytest.mark.slow
def test_the_wheel_holds_all_files_of_the_package(wheel):
    known = subprocess.run(["git", "ls-files", "gpt_fast"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    packed = set(wheel.namelist())
    assert {name for name in known.splitlines() if (ROOT / name).is_file()} <= packed
    kinds = {Path(name).suffix for name in packed if name.startswith("gpt_fast/")}
    assert {".py", ".typed", ".cpp", ".h", ".html", ".css", ".js", ".yaml", ".jsonl"} <= kinds
    (license_file,) = [name for name in packed if name.endswith("licenses/LICENSE")]
    text = wheel.read(license_file).decode()
    assert text == (ROOT / "LICENSE").read_text() and "Copyright 2023 Meta" in text and "BSD 3-Clause" in text
    assert not any(name.startswith(("tests", "scripts", "docs")) for name in packed)
    data = {name.partition(".data/data/share/gpt-fast/")[2] for name in packed} - {""}
    assert data == {"handler.py", "model_config.yaml", "deploy/config.properties"}


@pytest.mark.slow
def test_the_wheel_says_what_it_is(metadata):
    assert metadata["Name"] == "gpt-fast" and metadata["Version"] == gpt_fast.__version__
    assert metadata["License-Expression"] == "BSD-3-Clause AND MIT AND Apache-2.0"
    files = metadata.get_all("License-File")
    assert files[0] == "LICENSE" and len(files) == 5 and all(name.endswith(".LICENSE.txt") for name in files[1:])
    assert metadata["Requires-Python"] == ">=3.11" and "Typing :: Typed" in metadata.get_all("Classifier")
    assert str(metadata.get_payload()).strip() == PAGE.strip()


def test_the_page_s_links_work_anywhere_and_its_example_is_the_readme_s():
    links = re.findall(r"\]\(([^)]*)\)", PAGE)
    assert links and all(link.startswith("https://") for link in links)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```python\n.*?^```", PAGE, re.MULTILINE | re.DOTALL)
    assert example in readme


def test_the_changelog_knows_the_version():
    versions = re.findall(r"^## \[([\d.]+)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert versions[0] == gpt_fast.__version__
