"""scripts/download.py and prepare.sh against a hub on loopback."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from gpt_fast.load.checkpoint import load_checkpoint
from support.paths import ROOT
from support.tiny_models import save, tokenizer_json

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "someone/tiny-llama"
TOKEN = "hf_" + "x" * 34


class Hub(BaseHTTPRequestHandler):
    """The routes snapshot_download uses: a repository's commit, that commit's files, and a file."""

    files: dict[str, bytes]
    asked: list[str]

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        self.asked.append(self.path)
        path = self.path.partition("?")[0]
        name = path.removeprefix(f"/{REPO}/resolve/{COMMIT}/")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.reply(401, b"{}", {"X-Error-Code": "GatedRepo"}, body=body)
        elif path.startswith(f"/api/models/{REPO}/tree/{COMMIT}"):
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in self.files.items()
            ]
            self.reply(200, json.dumps(tree).encode(), {}, body=body)
        elif path.startswith(f"/api/models/{REPO}"):
            listed = {"id": REPO, "sha": COMMIT, "siblings": [{"rfilename": name} for name in self.files]}
            self.reply(200, json.dumps(listed).encode(), {}, body=body)
        elif name in self.files:
            data = self.files[name]
            self.reply(200, data, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT}, body=body)
        else:
            self.reply(404, b"{}", {"X-Error-Code": "EntryNotFound"}, body=body)

    def reply(self, status: int, data: bytes, headers: dict[str, str], *, body: bool) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), "Content-Type": "application/json", **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[type[Hub], dict[str, str]]]:
    """A hub with one repository: a tiny Llama with its tokenizer, and files that must not be fetched."""
    save("llama-gqa", tmp_path / "repo", max_shard_size="60KB")
    (tmp_path / "repo" / "tokenizer.json").write_bytes(tokenizer_json())
    files = {path.name: path.read_bytes() for path in (tmp_path / "repo").iterdir()}
    unwanted = {"pytorch_model.bin": b"x", "README.md": b"x", "modeling_tiny.py": b"x", "original/params.json": b"{}"}
    handler = type("Handler", (Hub,), {"files": files | unwanted, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    env = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",  # another test's switch must not reach these
        "PYTHONPATH": str(ROOT),
        "HF_HUB_DISABLE_XET": "1",
        "no_proxy": "127.0.0.1",
        "PYTHON": sys.executable,
    }
    yield handler, env
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_download_takes_what_converts_at_one_commit(hub: tuple[type[Hub], dict[str, str]], tmp_path: Path) -> None:
    handler, env = hub
    command = [sys.executable, str(ROOT / "scripts/download.py"), "--repo_id", REPO, "--hf_token", TOKEN]
    done = subprocess.run(command, cwd=tmp_path, env=env, check=True, capture_output=True, text=True)
    out = tmp_path / "checkpoints" / REPO / "hf"
    assert COMMIT in done.stdout and TOKEN not in done.stdout + done.stderr
    assert json.loads((out / "download.json").read_text()) == {"repo_id": REPO, "commit": COMMIT}
    got = {path.name for path in out.iterdir() if path.is_file()}
    shards = {name for name in handler.files if name.endswith(".safetensors")}
    others = {
        "model.safetensors.index.json",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "download.json",
    }
    assert got == shards | others


@pytest.mark.slow
def test_download_errors_are_one_line(hub: tuple[type[Hub], dict[str, str]], tmp_path: Path) -> None:
    _, env = hub
    for arguments in (["--repo_id", REPO, "--hf_token", "hf_wrong"], ["--repo_id", "not//valid"]):
        command = [sys.executable, str(ROOT / "scripts/download.py"), *arguments]
        failed = subprocess.run(command, cwd=tmp_path, env=env, check=False, capture_output=True, text=True)
        assert failed.returncode == 2 and "Traceback" not in failed.stderr and "download: " in failed.stderr
    assert not (tmp_path / "checkpoints" / REPO / "hf" / "download.json").exists()


@pytest.mark.slow
def test_prepare_downloads_converts_and_quantizes(hub: tuple[type[Hub], dict[str, str]], tmp_path: Path) -> None:
    _, env = hub
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")  # prepare.sh works in its own clone's checkpoints/
    command = ["bash", str(tmp_path / "scripts" / "prepare.sh"), REPO]
    subprocess.run(command, env={**env, "HF_TOKEN": TOKEN}, check=True, capture_output=True, text=True)
    out = tmp_path / "checkpoints" / REPO
    assert load_checkpoint(out, device="cpu").quantization is None
    assert load_checkpoint(out / "model_int8.safetensors", device="cpu").quantization is not None
    assert json.loads((out / "manifest.json").read_text())["source"] == {"repo_id": REPO, "commit": COMMIT}
    failed = subprocess.run(["bash", str(tmp_path / "scripts" / "prepare.sh")], check=False, capture_output=True)
    assert failed.returncode != 0 and b"usage" in failed.stderr


def test_which_files_are_chosen() -> None:
    spec = importlib.util.spec_from_file_location("download", ROOT / "scripts" / "download.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    choose = module.choose_files
    both = ["config.json", "model.safetensors", "pytorch_model.bin", "tokenizer.model", "x.py", "original/params.json"]
    assert choose(both) == ["config.json", "model.safetensors", "tokenizer.model"]
    old = [
        "config.json",
        "pytorch_model-00001-of-00002.bin",
        "pytorch_model-00002-of-00002.bin",
        "pytorch_model.bin.index.json",
        "flax_model.msgpack",
    ]
    assert choose(old) == sorted(old[:-1])
    assert choose(["consolidated.00.pth", "params.json", "tokenizer.model", "checklist.chk"]) == [
        "consolidated.00.pth",
        "params.json",
        "tokenizer.model",
    ]
    with pytest.raises(ValueError, match="no weights at the top"):
        choose(["README.md", "adapter_model.safetensors"])
