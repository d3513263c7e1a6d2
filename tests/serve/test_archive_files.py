"""An archive is the same bytes wherever it is built, and is served only as it was built."""

import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from gpt_fast.serve.archive_files import SUMS, check_archive
from support.paths import ROOT


def start_build(home: Path, fmt: str = "tgz", **environ: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "scripts/archive.py"), "--format", fmt]
    command += ["--model-store", str(home / "store"), "--work-dir", str(home / "work")]
    return subprocess.Popen(
        command, cwd=home, env=os.environ | environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        umask=0o077 if environ else 0o022,
    )  # fmt: skip


def built(process: subprocess.Popen[str], home: Path) -> Path:
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return next((home / "store").iterdir())


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default archive, as TorchServe unpacks it."""
    home = tmp_path_factory.mktemp("archive")
    with tarfile.open(built(start_build(home), home)) as archive:
        archive.extractall(home / "unpacked", filter="data")
    (root,) = (home / "unpacked").iterdir()
    return root


@pytest.mark.slow
def test_the_same_bytes_at_once_elsewhere_and_under_other_settings(tmp_path: Path) -> None:
    """torch-model-archiver works in TMPDIR/gpt-fast: two at once took each other's files."""
    homes = [tmp_path / name for name in ("one", "an other place")]
    for home in homes:
        home.mkdir()
    processes = [start_build(homes[0]), start_build(homes[1], TZ="Asia/Tokyo", LC_ALL="C"), start_build(homes[0])]
    first, second, _ = [built(p, h) for p, h in zip(processes, [*homes, homes[0]], strict=True)]
    assert first.read_bytes() == second.read_bytes()
    with tarfile.open(first) as archive:
        assert {(entry.mtime, entry.uid, entry.mode) for entry in archive} == {(315532800, 0, 0o644)}


@pytest.mark.slow
def test_an_archive_lists_every_file_that_it_serves_with(unpacked: Path) -> None:
    check_archive(unpacked)
    done = subprocess.run(["sha256sum", "--check", "--quiet", SUMS], cwd=unpacked, timeout=60)
    assert done.returncode == 0
    names = {p.relative_to(unpacked).as_posix() for p in unpacked.rglob("*") if p.is_file()}
    listed = {line.split("  ", 1)[1] for line in (unpacked / SUMS).read_text().splitlines()}
    assert names - listed == {SUMS, "MAR-INF/MANIFEST.json"}


@pytest.mark.slow
def test_the_yaml_of_a_folder_may_be_edited(tmp_path: Path) -> None:
    folder = built(start_build(tmp_path, "no-archive"), tmp_path)
    with open(folder / "model_config.yaml", "a") as file:
        file.write("# edited\n")
    check_archive(folder)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "changed": (lambda root: (root / "gpt_fast/config.py").write_text("x = 1\n"), "gpt_fast/config.py: differs"),
    "handler": (lambda root: (root / "handler.py").write_text("x = 1\n"), "handler.py: differs"),
    "yaml": (lambda root: (root / "model_config.yaml").write_text("minWorkers: 2\n"), "model_config.yaml: differs"),
    "missing": (lambda root: (root / "gpt_fast/llm.py").unlink(), "gpt_fast/llm.py: is in the archive's list and not"),
    "added": (lambda root: (root / "gpt_fast/serve/more.py").write_text(""), "gpt_fast/serve/more.py: is not in the"),
    "no list": (lambda root: (root / SUMS).unlink(), "SHA256SUMS: cannot be read"),
    "empty list": (lambda root: (root / SUMS).write_text(""), "SHA256SUMS: is no list"),
    "cut list": (lambda root: (root / SUMS).write_text((root / SUMS).read_text()[:-20] + "\nx\n"), "SHA256SUMS: is no"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_archive_is_refused_by_name(unpacked: Path, tmp_path: Path, damage: str) -> None:
    root = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(unpacked), str(root)], check=True)
    change, message = DAMAGES[damage]
    change(root)
    with pytest.raises(ValueError, match=r"make archive$") as refused:
        check_archive(root)
    assert str(refused.value).startswith(message)
