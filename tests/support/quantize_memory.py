"""Peak memory of quantizing a random model of a given shape:
`python tests/support/quantize_memory.py --mode int4-gptq`.

Writes a checkpoint of Llama 70B's layers (unless said otherwise) under a temporary directory, quantizes it in a
process of its own, and prints what that process held above what it held before: at its peak in all (VmHWM: the pages
of mapped files count too), and of memory that no file stands behind (RssAnon, sampled).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as pytest has it, to find support

import torch

from gpt_fast.checkpoint.directory import FORMAT
from gpt_fast.checkpoint.safetensors_file import TensorSpec, write_weights
from gpt_fast.config import ModelConfig
from gpt_fast.convert.quantized import Calibration, quantize_checkpoint
from gpt_fast.model.empty import empty_model
from support.manifest import list_files
from support.quantized import hugging_face_config, small_config

LLAMA_70B = {"dim": 8192, "n_head": 64, "n_kv_head": 8, "head_dim": 128, "intermediate_size": 28672}


def write_random(directory: Path, config: ModelConfig) -> int:
    """A bfloat16 checkpoint, a tensor at a time; the bytes of a layer."""
    directory.mkdir(parents=True, exist_ok=True)
    state = empty_model(config).state_dict()
    specs = [TensorSpec(name, torch.bfloat16, tuple(tensor.shape)) for name, tensor in state.items()]

    def produce(spec: TensorSpec) -> torch.Tensor:
        tensor = torch.empty(spec.shape, dtype=spec.dtype)
        return tensor.fill_(1) if len(spec.shape) == 1 else tensor.normal_(std=0.02)

    (directory / "config.json").write_text(json.dumps(hugging_face_config(config)))
    write_weights(directory, "model", specs, produce, metadata=FORMAT)
    list_files(directory)
    return sum(spec.nbytes for spec in specs if spec.name.startswith("layers.0."))


def peaks(directory: Path, mode: str, *, windows: int = 4, length: int = 256) -> tuple[int, int]:
    """(peak of all resident memory, peak of anonymous memory) of quantizing, in bytes above the start's."""
    command = [sys.executable, __file__, "--measure", str(directory), "--mode", mode]
    command += ["--windows", str(windows), "--length", str(length)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    resident, anonymous = output.split()[-2:]
    return int(resident), int(anonymous)


def measure(directory: Path, mode: str, *, windows: int, length: int) -> None:
    tokens = torch.randint(0, 96, (windows, length), generator=torch.Generator().manual_seed(0))
    calibration = Calibration(tokens, "random tokens", "")
    before = {key: status(key) for key in ("VmRSS", "RssAnon")}
    anonymous, done = [0], threading.Event()

    def sample() -> None:
        while not done.wait(0.02):
            anonymous[0] = max(anonymous[0], status("RssAnon"))

    sampler = threading.Thread(target=sample)
    sampler.start()
    quantize_checkpoint(directory, mode=mode, calibration=calibration)
    done.set()
    sampler.join()
    print(status("VmHWM") - before["VmRSS"], anonymous[0] - before["RssAnon"])


def status(key: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) * 1024


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--mode", default="int4-gptq")
    flags.add_argument("--layers", type=int, default=1)
    flags.add_argument("--windows", type=int, default=4)
    flags.add_argument("--length", type=int, default=256)
    flags.add_argument("--measure", type=Path)
    args = flags.parse_args()
    if args.measure is not None:
        measure(args.measure, args.mode, windows=args.windows, length=args.length)
        return
    with tempfile.TemporaryDirectory() as directory:
        layer = write_random(Path(directory), small_config(**LLAMA_70B, n_layer=args.layers, tie_embeddings=False))
        start = time.perf_counter()
        resident, anonymous = peaks(Path(directory), args.mode, windows=args.windows, length=args.length)
    print(
        f"{args.mode}, {args.layers} layer(s) of {layer / 1e9:.2f} GB, {args.windows} windows of {args.length} tokens"
    )
    seconds = time.perf_counter() - start
    print(f"peak {resident / 1e9:.2f} GB, of it anonymous {anonymous / 1e9:.2f} GB, in {seconds:.0f} s")
    print(f"bound: 1.3 layers + 2 GB = {(1.3 * layer + 2e9) / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
