"""The archive: what serving needs, whole enough to serve from it alone, and nothing of the commands."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from gpt_fast.convert.quantized import quantize_checkpoint
from gpt_fast.serve.page.assets import chat_page
from gpt_fast.torchserve import archive
from gpt_fast.torchserve.served_files import imported_modules
from support.paths import ROOT
from support.quantized import random_model, small_config, write_checkpoint

pytestmark = pytest.mark.slow

COMMANDS = {"bench", "convert", "draft", "eval", "measure", "torchserve", "generate.py", "chat.py", "pull.py"}
OF_QUANTIZING = {"gptq.py", "gptq_model.py", "gptq_streaming.py", "grid_search.py", "__main__.py"}
SERVE = """
import json, sys
from pathlib import Path
from gpt_fast.serve.exchange import Incoming
from gpt_fast.serve.page.assets import chat_page
from gpt_fast.serve.startup import start_serving

here = Path(sys.argv[1])
for file in sorted((here / "gpt_fast").rglob("*.py")):
    if not file.stem.endswith("_triton"):  # Triton is not everywhere
        __import__(".".join(file.relative_to(here).with_suffix("").parts))
handler = {"checkpoint_path": sys.argv[2], "max_num_seqs": 2, "threads": 1, "speculate": "ngram"}
yaml = {"handler": handler, "continuousBatching": True, "batchSize": 8}
rounds = start_serving(yaml, root=here, model_name="gpt-fast")
asked = {
    "text": Incoming("", b'{"prompt": "abcabcabc", "max_new_tokens": 9, "stream": false, "ignore_eos": true}'),
    "page": Incoming("chat", b""),
    "script": Incoming(next(path for path in chat_page() if path.endswith("main.js")), b""),
}
active, answers = set(asked), {}
while active:
    for name, reply in rounds.run(sorted(active), asked).items():
        answers[name] = (reply.status, len(reply.text))
        if reply.more is not True:
            active.discard(name)
    asked = {}
loaded = {m.__file__ for n, m in sys.modules.items() if n.startswith("gpt_fast") and m.__file__}
assert all(Path(file).is_relative_to(here) for file in loaded), loaded
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped archive, as TorchServe unpacks it."""
    home = tmp_path_factory.mktemp("archive")
    made = archive.build(
        handler=ROOT / "handler.py",
        config=ROOT / "model_config.yaml",
        model="",
        fmt="tgz",
        store=home / "store",
        work=home / "work",
    )
    with tarfile.open(made) as tar:
        tar.extractall(home / "unpacked", filter="data")
    return home / "unpacked" / archive.MODEL_NAME


def test_commands_stay_out_and_data_of_what_serves_is_in(unpacked: Path) -> None:
    assert (unpacked / "handler.py").is_file() and (unpacked / "model_config.yaml").is_file()
    package = unpacked / "gpt_fast"
    assert not COMMANDS & {path.name for path in package.iterdir()}
    assert not OF_QUANTIZING & {path.name for path in (package / "quantize").iterdir()}
    assert not list(package.rglob("__main__.py"))
    data = {str(path.relative_to(package)) for path in package.rglob("*.*") if path.suffix != ".py"}
    assert {
        "serve/page/chat.html",
        "serve/page/vendor/marked.esm.js",
        "ops/cpu/src/decoder.cpp",
        "ops/cpu/src/decoder.h",
    } <= data
    assert not [name for name in data if name.endswith((".jsonl", ".yaml"))]


def test_an_answer_and_the_page_come_from_the_archive_alone(unpacked: Path, tmp_path: Path) -> None:
    """Every module of it imports, lazily imported ones included, and what runs lies in the archive."""
    made = write_checkpoint(tmp_path, random_model(small_config(vocab_size=257)), tokenizer=True)
    weights = quantize_checkpoint(made, mode="int8")
    run = subprocess.run(
        [sys.executable, "-c", SERVE, str(unpacked), str(weights)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(unpacked)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr
    answers = json.loads(run.stdout.splitlines()[-1])
    assert answers["page"] == [200, len(chat_page()["chat"].text)]
    assert answers["script"] == [200, len((ROOT / "gpt_fast/serve/page/main.js").read_text(encoding="utf-8"))]
    assert answers["text"][0] == 200 and answers["text"][1] > 0


def test_imports_in_functions_and_of_names_in_packages_count(tmp_path: Path) -> None:
    files = {
        "gpt_fast/__init__.py": "",
        "gpt_fast/a/__init__.py": "",
        "gpt_fast/a/one.py": "def late():\n    from gpt_fast.a import two\n",
        "gpt_fast/a/two.py": "import gpt_fast.b.three\nimport json\n",
        "gpt_fast/b/three.py": "from gpt_fast.a.one import late\n",
        "gpt_fast/b/four.py": "",
        "handler.py": "from gpt_fast.a.one import late\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = imported_modules(tmp_path / "handler.py", tmp_path)
    assert {str(path) for path in found} == files.keys() - {"handler.py", "gpt_fast/b/four.py"}


def test_the_bundle_needs_no_git(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "gpt_fast", tmp_path / "src" / "gpt_fast")
    archive.stage_bundle(tmp_path / "src", tmp_path / "without")
    archive.stage_bundle(ROOT, tmp_path / "with")
    names = [
        {str(p.relative_to(tmp_path / kind)) for p in (tmp_path / kind).rglob("*")} for kind in ("with", "without")
    ]
    assert names[0] == names[1] and "gpt_fast/__init__.py" in names[0]
    assert not [name for name in names[0] if name.endswith(".pyc") or "__pycache__" in name]


def test_nothing_is_built_when_nothing_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"config": tmp_path / "c.yaml", "model": "", "fmt": "no-archive"}
    options["config"].write_text((ROOT / "model_config.yaml").read_text())
    places = {"handler": ROOT / "handler.py", "store": tmp_path / "store", "work": tmp_path / "work"}
    made = [archive.build(**options, **places) for _ in range(2)]
    assert made[0] == made[1] and capsys.readouterr().out.endswith("is up to date\n")
