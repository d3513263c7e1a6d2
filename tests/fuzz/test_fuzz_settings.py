"""Settings that somebody mistyped: taken, or refused in lines that name a key; never a traceback."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given

from gpt_fast.serve import frontend_keys
from gpt_fast.serve.archive_files import SUMS, check_archive, write_sums
from gpt_fast.serve.model_config import problems_of
from gpt_fast.serve.startup_check import check_properties, parse_properties
from support.examples import examples
from support.mutations import corpus, files, mutated
from support.paths import ROOT

CONFIGS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "configs").glob("*.yaml"))
PROPERTIES = next(path for path in ("deploy/config.properties", "gpt_fast/torchserve/config.properties")
                  if (ROOT / path).is_file())  # fmt: skip


@examples(250)
@given(data=mutated([*files("model_config.yaml", *CONFIGS), *corpus("yaml")]))
def test_model_config(data):
    try:
        problems = problems_of(frontend_keys.parse(data.decode("utf-8", "replace")), root=ROOT)
    except ValueError as error:
        problems = [str(error)]
    assert all(problem and "\n" not in problem for problem in problems)


@examples(300)
@given(data=mutated([*files(PROPERTIES), b"inference_address=[::1]:1\n"]))
def test_properties(data):
    text = data.decode("latin-1")
    try:
        settings = parse_properties(text)
    except ValueError as error:
        assert check_properties(text) == [str(error)]
    else:
        assert all(isinstance(value, str) for pair in settings.items() for value in pair)
        assert all("\n" not in problem for problem in check_properties(text))


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    root = tmp_path_factory.mktemp("archive")
    names = ("gpt_fast/a.py", "gpt_fast/b/c.py", "handler.py")
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    write_sums(root, {name: root / name for name in names})
    return root, (root / SUMS).read_bytes()


@examples(80)
@given(data=mutated([b"seed"]))
def test_an_archives_list(archive, data):
    """Of the list, every change is found; so is every change of a file."""
    root, good = archive
    for name in (SUMS, "gpt_fast/b/c.py"):
        whole = (root / name).read_bytes()
        changed = data if name != SUMS else good + data
        (root / name).write_bytes(changed)
        try:
            check_archive(root)
        except ValueError as error:
            assert "\n" not in str(error) and "make archive" in str(error)
        else:
            assert name == SUMS and changed.split() == good.split()
        (root / name).write_bytes(whole)
