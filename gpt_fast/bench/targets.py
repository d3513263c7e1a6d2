"""From the command line to what makes each target. The makers run in the targets' own processes (remote.py).

Only there are torch and the engine imported: this process stays small.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpt_fast.bench.peers import PeerOptions, load_peer
from gpt_fast.bench.sample import Target
from gpt_fast.cli.quiet_gc import at_rest
from gpt_fast.files import read_json_object

ENGINE_OPTIONS = ("dtype", "kv_cache", "kernels", "device", "compile", "compile_prefill")
Factory = tuple[Callable[..., Any], dict[str, Any]]  # what makes a target, and its options


def factories(args: argparse.Namespace, threads: int, kv_elements: int | None) -> dict[str, Factory]:
    """By name, in the order in which they take turns."""
    longest, rows = max(args.prompt_len) + args.max_new_tokens, max(args.batch_size)
    if args.long_prompt:
        longest, rows = max(longest, args.long_prompt + 256), max(rows, 2)
    found: dict[str, Factory] = {}
    options = {name: getattr(args, name) for name in ENGINE_OPTIONS}
    sizes = {"threads": threads, "max_seq_len": longest, "max_num_seqs": rows}
    ours = {"checkpoint_path": str(args.checkpoint_path), **sizes, **options}
    if args.engine:
        found["engine"] = engine, ours
    if args.tp > 1:
        share = {"threads": max(1, threads // args.tp)}  # as many in all as every other target
        found[f"engine on {args.tp} ranks"] = engine_on_ranks, ours | share | {"tp": args.tp}
    if args.http:
        found["http"] = http, {"url": args.http, "token": args.token}
    for name, path in args.peer:
        peer = PeerOptions(path, args.gguf, args.checkpoint_path, threads, longest, kv_elements, ours)
        found[name] = load_peer, {"name": name, "options": peer}
    return found


def model_facts(checkpoint: Path) -> tuple[int, int | None]:
    """(ids that prompts are drawn from, cache elements of one position over all layers) by the config.json there."""
    if not checkpoint.exists():
        raise ValueError(f"checkpoint_path: no such file or directory (got {checkpoint})")
    path = (checkpoint if checkpoint.is_dir() else checkpoint.parent) / "config.json"
    config = read_json_object(path)
    try:
        heads = config["num_attention_heads"]
        head_dim = config.get("head_dim") or config["hidden_size"] // heads
        kv_heads = config.get("num_key_value_heads") or heads
        return min(1000, config["vocab_size"]), 2 * config["num_hidden_layers"] * kv_heads * head_dim
    except KeyError as error:
        raise ValueError(f"{path}: no {error}") from None


def engine(**options: Any) -> Target:
    with at_rest():
        from gpt_fast.bench.engine_target import EngineTarget

    return EngineTarget(**options)


def engine_on_ranks(**options: Any) -> Target:
    with at_rest():
        from gpt_fast.bench.ranks_target import RanksTarget

    return RanksTarget(**options)


def http(**options: Any) -> Target:
    from gpt_fast.bench.over_http import HttpTarget

    return HttpTarget(**options)


def bandwidth(**options: Any) -> Any:
    from gpt_fast.bench.bandwidth import Bandwidth

    return Bandwidth(**options)
