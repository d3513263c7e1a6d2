"""The README's commands, run as they stand there."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from gpt_fast.config import EngineConfig
from gpt_fast.convert.hf import open_job
from gpt_fast.convert.run import convert
from gpt_fast.serve.model_config import ServeConfig
from support.letters import letters_tokenizer
from support.paths import ROOT
from support.tiny_models import save

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def run(command: list[str], *, cwd: Path = ROOT, typed: str = "") -> str:
    done = subprocess.run(command, cwd=cwd, env=ENVIRONMENT, input=typed, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def commands(start: str) -> list[str]:
    """Every command of the README's shell blocks that begins so, with its continued lines joined."""
    lines = "\n".join(text for kind, text in BLOCKS if kind == "").replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.startswith(start)]


@pytest.mark.model
def test_the_library_example_streams_an_answer():
    (example,) = [text for kind, text in BLOCKS if kind == "python"]
    assert len(example.strip().splitlines()) <= 8
    assert run([sys.executable, "-c", example]).startswith(" Paris")


@pytest.mark.model
def test_generate_runs():
    for command in (c for c in commands("python -m gpt_fast.generate") if "TARGET" not in c):
        short = ["--num_samples", "1", "--max_new_tokens", "4", "--max_seq_len", "256"]
        shown = run([sys.executable, *shlex.split(command)[1:], *short], typed="Hi!\n/exit\n")
        assert "Average tokens/sec" in shown or "Type a message" in shown


@pytest.mark.slow
def test_the_lines_for_a_draft_run_one_after_the_other(tmp_path):
    """Of a tiny target and a tiny draft, that transformers saved, with what makes them quick."""
    places = {"DRAFT": tmp_path / "draft_hf", "TARGET": tmp_path / "target", "checkpoints/draft": tmp_path / "draft"}
    for name, family in (("target_hf", "llama-gqa"), ("draft_hf", "llama-mqa")):
        save(family, tmp_path / name)
        (tmp_path / name / "tokenizer.json").write_bytes(letters_tokenizer())
    convert(open_job(tmp_path / "target_hf"), tmp_path / "target", progress=False)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"category": "code", "prompt": "abcabcabca"}))
    brief = ["--max_new_tokens", "8", "--max_seq_len", "64"]
    more = {
        "scripts/convert_ckpt.py": [],
        "gpt_fast.generate": [*brief, "--num_samples", "1", "--prompt", "abcabc"],
        "gpt_fast.draft": [*brief, "--prompts", str(prompts), "--batch_sizes", "1", "--repeat", "1"],
    }
    lines = [shlex.split(c)[1:] for c in commands("python ") if "TARGET" in c]
    shown = []
    for words in lines:
        known = next(flags for name, flags in more.items() if name in words)
        shown.append(run([sys.executable, *(str(places.get(word, word)) for word in words), *known]))
    converted, generated, reported = shown
    assert "a draft for" in converted and "best k" in reported
    assert "times as fast" in generated and "Acceptance by position: 1: " in generated


def test_make_knows_every_target():
    for command in commands("make "):
        target, *_ = shlex.split(command)[1:]
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target


def test_scripts_exist():
    for script in re.findall(r"scripts/[\w.]+", README):
        assert (ROOT / script).is_file(), script


def test_linked_pages_exist():
    for page in re.findall(r"\]\(([^)h#][^)]*)\)", README):
        assert (ROOT / page).is_file(), page


@pytest.mark.model
def test_the_archiver_line_makes_an_archive_with_the_package(tmp_path):
    """`make bundle` and the archiver's line; tests/serve/test_serve_scripts.py serves what such lines make."""
    for name in ("handler.py", "model_config.yaml"):
        (tmp_path / name).symlink_to(ROOT / name)
    run([sys.executable, str(ROOT / "scripts/archive.py"), "--bundle-only"])
    (tmp_path / "build").symlink_to(ROOT / "build")
    (line,) = commands("torch-model-archiver")
    run(shlex.split(line), cwd=tmp_path)
    names = run(["tar", "tzf", "gpt-fast.tar.gz"], cwd=tmp_path).splitlines()
    for name in ("handler.py", "model_config.yaml", "gpt_fast/engine/core.py", "gpt_fast/serve/page/chat.html"):
        assert f"gpt-fast/{name}" in names


PAGES = sorted((ROOT / "docs").glob("*.md"))
WORDS = {  # what comes before a command's flags
    "gpt_fast.bench": [[], ["--gpu"]],
    "gpt_fast.draft": [["report"], ["speed"], ["verify"], ["random"]],
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_is_named_by_the_readme_and_its_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    assert f"(docs/{page.name})" in README
    for link in re.findall(r"\]\(([^)h#][^)#]*)[^)]*\)", text):
        assert (page.parent / link).exists(), link
    for path in re.findall(r"`((?:gpt_fast|tests|scripts|deploy|configs|benchmarks)/[\w./-]+\.\w+)`", text):
        assert (ROOT / path).is_file(), path


@pytest.mark.parametrize("page", [*PAGES, *sorted(ROOT.glob("*.md"))], ids=lambda page: page.stem)
def test_a_page_s_lines_fit_a_screen(page):
    """Rows of tables and what programs printed (in fences) are as long as they are."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    assert [line for line in text.splitlines() if len(line) > 120 and not line.startswith("|")] == []


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_s_commands_have_the_flags_it_names(page):
    """What `--help` of the command says; a continued line is one command."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    asked: dict[str, set[str]] = {}
    for module, rest in re.findall(r"python -m (gpt_fast[.\w]+\w)((?: +[^\n`|#)]+)?)", text):
        asked.setdefault(module, set()).update(re.findall(r"--[a-z_]+", rest))
    for module, flags in asked.items():
        known = "".join(run([sys.executable, "-m", module, *words, "--help"]) for words in WORDS.get(module, [[]]))
        assert flags <= {*re.findall(r"--[a-z_]+", known)}, module


def test_the_configuration_table_has_every_key():
    page = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
    table = page.split("## Configuration")[1].split("\n## ")[0]
    named = {key for row in re.findall(r"^\| (`[^|]*) \|", table, re.MULTILINE) for key in re.findall(r"`(\w+)`", row)}
    keys = {field.name for kind in (EngineConfig, ServeConfig) for field in dataclasses.fields(kind)}
    assert named == keys
