"""python -m gpt_fast.bench.gpu.cold SHAPE FORMAT DEVICE: make a model, warm up, say when the first token is there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any


def cold_start(name: str, form: str, device: str) -> dict[str, Any]:
    """Seconds from before a fresh process exists to its first token, with no compiled kernel to be found on disk."""
    with tempfile.TemporaryDirectory() as empty:
        fresh = os.environ | {"TRITON_CACHE_DIR": empty, "TORCHINDUCTOR_CACHE_DIR": empty}
        started = time.time()
        command = [sys.executable, "-m", "gpt_fast.bench.gpu.cold", name, form, device]
        done = subprocess.run(command, env=fresh, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no output"])[-1])
    stamps = json.loads(done.stdout.splitlines()[-1])
    return {f"{name}_s": stamp - started for name, stamp in stamps.items()}


def main(name: str, form: str, device_name: str) -> None:
    import torch

    from gpt_fast.bench.gpu.models import SHAPES, TINY, random_model
    from gpt_fast.bench.gpu.rows import Subject
    from gpt_fast.ops.gpu.graph import DecodeLoop
    from gpt_fast.ops.gpu.state import Row

    stamps = {"imports": time.time()}
    device = torch.device(device_name)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    subject = Subject(random_model((SHAPES | TINY)[name], form, device, dtype), fp8=form == "fp8")
    cache = subject.cache(1, 2048)
    stamps["weights"] = time.time()
    loop = DecodeLoop(subject.decoder, cache, rows=1, steps=1, eos_ids=[])
    loop.warm_up()
    stamps["warm"] = time.time()
    next(loop.run([Row(slot=0, token=1, position=100, limit=102)]))
    stamps["first_token"] = time.time()
    print(json.dumps(stamps))


if __name__ == "__main__":
    main(*sys.argv[1:])
