"""The chat page's libraries are what npm published, each with its licence, and the bill of materials names them."""

from __future__ import annotations

import json
import re
import shutil
import sys

import pytest

from gpt_fast.serve.page.assets import chat_page
from support.paths import ROOT

sys.path.insert(0, str(ROOT / "scripts"))

import vendor

PACKAGES = vendor.read_list()


def test_they_are_as_listed():
    assert vendor.problems() == []


def test_a_change_is_found(tmp_path):
    folder = tmp_path / "vendor"
    shutil.copytree(vendor.VENDOR, folder)
    (folder / "marked.esm.js").write_text("x")
    (folder / "katex.min.js").unlink()
    (folder / "other.js").write_text("x")
    found = " ".join(vendor.problems(folder))
    assert len(vendor.problems(folder)) == 3
    for name in ("marked.esm.js: differs", "katex.min.js: listed", "other.js: not listed"):
        assert name in found


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package["package"])
def test_each_has_its_licence_and_an_exact_version(package):
    assert re.fullmatch(r"\d+\.\d+\.\d+", package["version"])
    (licence,) = [name for name in package["files"] if name.endswith(".LICENSE.txt")]
    text = (vendor.VENDOR / licence).read_text(encoding="utf-8")
    words = {
        "MIT": "Permission is hereby granted",
        "BSD-3-Clause": "Redistribution and use",
        "Apache-2.0": "Apache License",
    }
    assert words[package["license"]] in text
    assert package["license"] in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    told = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
    assert re.search(
        rf"{re.escape(package['package'])}\s+{re.escape(package['version'])}\s+\({package['license']}\)", told
    )


def test_the_page_serves_all_of_them():
    served = {path.rsplit("/", 1)[1] for path in chat_page() if "/vendor/" in path}
    assert served == {name for package in PACKAGES for name in package["files"] if name.endswith(".js")}


def test_the_bill_of_materials_names_them():
    made = vendor.components(PACKAGES)
    assert {part["purl"] for part in made} >= {"pkg:npm/%40highlightjs/cdn-assets@11.12.0"}
    assert len({part["bom-ref"] for part in made}) == len(PACKAGES)
    assert "vendor.components" in (ROOT / "scripts/sbom.py").read_text(encoding="utf-8")
    json.dumps(made)
