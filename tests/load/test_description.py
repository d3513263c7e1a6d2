"""What a loaded engine says of itself: log readers go by these keys, in this order."""

from __future__ import annotations

import json
from pathlib import Path

from gpt_fast.llm import Engine
from support.quantized import random_model, small_config, write_checkpoint


def test_the_description_keeps_its_keys_and_order(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, random_model(small_config(vocab_size=257)), tokenizer=True)
    told = Engine.load(str(directory), kernels="plain", device="cpu", max_num_seqs=2, threads=1).description
    written = json.loads(json.dumps(told.as_dict()))
    assert list(written) == [
        "checkpoint",
        "quantization",
        "path",
        "tuning",
        "device",
        "threads",
        "torch_threads",
        "dtype",
        "kv_cache",
        "kv_cache_gib",
        "max_seq_len",
        "max_num_seqs",
        "speculate",
        "weight_bytes_per_step",
        "greedy_bytes_per_step",
        "load_seconds",
    ]
    assert written["checkpoint"].endswith("model.safetensors") and written["path"] == "plain (kernels: plain)"
    assert (written["quantization"], written["dtype"], written["kv_cache"]) == ("none", "float32", "float32")
    assert (written["device"], written["threads"], written["max_num_seqs"], written["speculate"]) == (
        "cpu",
        1,
        2,
        "none",
    )
