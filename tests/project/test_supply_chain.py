"""Locks agree, excuses run out, and the bill of materials accounts for all of TorchServe's Java archive."""

from __future__ import annotations

import datetime
import importlib.util
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from support.paths import ROOT

sys.path.insert(0, str(ROOT / "scripts"))

import audit
import fetch_model
import sbom

TODAY = datetime.date(2026, 11, 30)


def test_the_hashed_lock_has_every_locked_version_but_torch():
    locked = dict(re.findall(r"^([\w.-]+)==([^\s;]+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE))
    text = (ROOT / "requirements-hashed.lock").read_text()
    hashed = dict(re.findall(r"^([\w.-]+)==([^\s;]+)", text, re.MULTILINE))
    assert hashed == {name: version for name, version in locked.items() if name != "torch"}
    for block in re.split(r"\n(?=[a-z0-9])", text)[1:]:
        assert re.search(r"\s--hash=sha256:[0-9a-f]{64}\b", block), block.splitlines()[0]


def test_the_audits_own_tools_are_pinned():
    lines = (ROOT / "requirements-audit.lock").read_text().splitlines()[1:]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    assert {"pip_audit", "cyclonedx-bom"} <= {line.split("==")[0] for line in lines}


def test_an_excuse_has_a_day_and_a_reason():
    assert audit.read_excuses(audit.IGNORED.read_text(), today=TODAY) is not None
    text = "# why\n\nCVE-2026-1 2026-12-01 not reachable: we do not call it\nGHSA-ab-cd-ef 2026-11-30 also\n"
    assert set(audit.read_excuses(text, today=TODAY)) == {"CVE-2026-1", "GHSA-ab-cd-ef"}
    with pytest.raises(ValueError, match="CVE-2026-1 was excused until 2026-12-01"):
        audit.read_excuses(text, today=datetime.date(2026, 12, 2))
    for line in ("CVE-2026-1", "CVE-2026-1 tomorrow x", "CVE-2026-1 2026-12-01", "* 2026-12-01 all"):
        with pytest.raises(ValueError, match="not an id, a day and a reason"):
            audit.read_excuses(line, today=TODAY)


def test_flaws_are_told_unless_excused_by_any_of_their_names():
    flaw = {"id": "PYSEC-1", "aliases": ["CVE-2026-1"], "fix_versions": ["2"]}
    packages = [{"name": "a", "version": "1", "vulns": [flaw]}, {"name": "b", "version": "1", "vulns": []}]
    assert audit.unexcused(packages, {}) == ["a 1: PYSEC-1 (mended in 2)"]
    assert audit.unexcused(packages, {"CVE-2026-1": "why"}) == []


def test_the_java_archive_is_accounted_for():
    spec = importlib.util.find_spec("ts")
    with zipfile.ZipFile(Path(spec.origin).parent / "frontend" / "model-server.jar") as archive:
        names = archive.namelist()
        netty = archive.read("META-INF/io.netty.versions.properties").decode()
    parts = {part["name"]: part for part in sbom.jar_components(names)}
    assert f"netty-codec-http.version={parts['netty-all']['version']}" in netty
    assert {"gson", "log4j-core", "snakeyaml", "guava", "groovy-all", "grpc-netty-shaded"} <= parts.keys()
    assert {full.split("/")[1] for full, *_ in sbom.JAR.values()} == parts.keys()  # nothing listed that is not there
    with pytest.raises(ValueError, match="nobody has said what brings com/evil"):
        sbom.jar_components(["com/evil/A.class"])


def test_a_model_of_other_bytes_is_refused(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF other")
    with pytest.raises(ValueError, match="not the model that was tested"):
        fetch_model.verified(tmp_path / "model.gguf", tmp_path / "x.whl")


@pytest.mark.slow
def test_the_lock_script_leaves_torch_out_of_the_hashes(tmp_path):
    """torch's block, of as many lines as it has, and no other that begins like it."""
    expression = re.search(r"sed -e '(/\^torch==.*)' \"\$work/hashed", (ROOT / "scripts/lock.sh").read_text())[1]
    text = "a==1 \\\n    --hash=x\ntorch==2 \\\n    --hash=y \\\n    --hash=z\ntorchserve==1 \\\n    --hash=w\n"
    left = subprocess.run(["sed", "-e", expression], input=text, capture_output=True, text=True, check=True).stdout
    assert left == "a==1 \\\n    --hash=x\ntorchserve==1 \\\n    --hash=w\n"
