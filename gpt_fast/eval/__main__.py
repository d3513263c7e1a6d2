"""gpt-fast eval: task scores (--tasks), or a quantized checkpoint against its source (--quality).

`torchrun --nproc_per_node N -m gpt_fast.eval` does the same with a model held by N ranks (tensor parallelism).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from gpt_fast.checkpoint.directory import WEIGHTS
from gpt_fast.checkpoint.quality_gate import report_path
from gpt_fast.cli.errors import refuse_useless
from gpt_fast.cli.parser import CommandParser
from gpt_fast.config import EngineConfig, check_int
from gpt_fast.convert.named import CHECKPOINT_HELP, converted
from gpt_fast.engine import ranks
from gpt_fast.engine.ranks import Group
from gpt_fast.eval.quality_report import Passage, make_report, plot, table
from gpt_fast.files import write_json
from gpt_fast.measure.picture import picture_path
from gpt_fast.measure.texts import default_text, file_text, held_out_part

TASK_FLAGS = ("tasks", "limit", "num_fewshot", "max_seq_length", "batch_size", "compile")
QUALITY_FLAGS = ("against", "against_dtype", "kernels", "text", "windows", "seq_length", "plot")


def main(arguments: list[str] | None = None) -> None:
    ranks.run_command(lambda group: run(arguments, group))


def run(arguments: list[str] | None, group: Group | None) -> None:
    """The command itself, in one process or on rank 0 of a group, whose other ranks compute with it."""
    flags = parser()
    args = flags.parse_args(arguments)
    if (args.quality is None) == (args.checkpoint_path is None):
        flags.error("give either --checkpoint_path with --tasks, or --quality")
    names, other = (TASK_FLAGS, "--quality") if args.quality is not None else (QUALITY_FLAGS, "--checkpoint_path")
    refuse_useless(flags, arguments, names, why=f"{other} is given")
    for key, named in [("checkpoint_path", args.checkpoint_path), ("quality", args.quality), ("against", args.against)]:
        if named is not None:
            setattr(args, key, converted(str(named)))
    report = run_quality(args, group) if args.quality is not None else run_tasks(args, group)
    if report is not None:
        print(json.dumps(report))


def parser() -> CommandParser:
    flags = CommandParser(prog="gpt-fast eval", description=__doc__)
    add = flags.add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    add("--dtype", default="auto", help="auto, float32, bfloat16, float16; --quality: float32 unless said")
    add("--kv_cache", default="auto", help="auto, float32, bfloat16, float16, int8")
    tasks = flags.add_argument_group("task scores, through lm-evaluation-harness")
    add = tasks.add_argument
    add("--checkpoint_path", help=CHECKPOINT_HELP)
    add(
        "--tasks",
        nargs="+",
        default=["basics"],
        metavar="TASK",
        help="the harness's tasks; basics, basics_generate, basics_perplexity (offline); a .yaml file",
    )
    add("--limit", type=int, help="documents of each task; all unless said")
    add("--num_fewshot", type=int, help="worked examples before each question; the task's own number unless said")
    add("--max_seq_length", type=int, default=0, help="tokens of context; 0: the model's own, at most 8192")
    add("--batch_size", type=int, default=8, help="rows scored, and requests generated, together")
    add("--compile", action="store_true", help="compile the forward passes")
    quality = flags.add_argument_group("quality of a quantized checkpoint")
    add = quality.add_argument
    add("--quality", type=Path, metavar="A", help="the quantized weights file")
    add("--against", type=Path, metavar="B", help=f"its source; {WEIGHTS} beside it unless said")
    add("--against_dtype", default="auto", help="what the source computes in; auto: dtype")
    add("--kernels", default="plain", help="plain judges the weights; auto is as served, fused where there is a way")
    add("--text", type=Path, help="a UTF-8 file; the held-out part of this Python's help texts unless said")
    add("--windows", type=int, default=8, help="pieces of the text")
    add("--seq_length", type=int, default=512, help="tokens of a piece")
    add("--plot", type=picture_path, help="write a picture (needs matplotlib)")
    return flags


# ------------------------------------------------------------------------------------------- quality


def run_quality(args: argparse.Namespace, group: Group | None) -> dict[str, Any] | None:
    check_int("windows", args.windows, 1, 1 << 20)
    check_int("seq_length", args.seq_length, 128, 1 << 17)
    text = held_out_part(default_text()) if args.text is None else file_text(args.text)
    dtype = "float32" if args.dtype == "auto" else args.dtype
    ours = EngineConfig(
        checkpoint_path=str(args.quality), device=args.device, dtype=dtype, kv_cache=args.kv_cache, kernels=args.kernels
    )
    against = EngineConfig(
        checkpoint_path=str(args.against or args.quality.with_name(WEIGHTS)),
        device=args.device,
        dtype=dtype if args.against_dtype == "auto" else args.against_dtype,
        kernels="plain",
    )
    made = make_report(ours, against, Passage(text, args.windows, args.seq_length), group)
    if made is None:
        return None
    weights, report, tokens = made
    print(table(report))
    if args.plot is not None:
        plot(report, tokens, args.plot)
    path = report_path(weights, kv_cache=args.kv_cache)
    write_json(report, path)
    print(f"recorded in {path}")
    return report


# --------------------------------------------------------------------------------------------- tasks


def run_tasks(args: argparse.Namespace, group: Group | None) -> dict[str, Any] | None:
    from gpt_fast.eval.tasks import load_tasks

    check_int("batch_size", args.batch_size, 1, 256)
    if args.limit is not None:
        check_int("limit", args.limit, 1, 1 << 31)
    if args.num_fewshot is not None:
        check_int("num_fewshot", args.num_fewshot, 0, 1 << 10)
    load_tasks(args.tasks)  # refuse an unknown task before the model is loaded
    from gpt_fast.eval.harness import EngineLM, evaluate
    from gpt_fast.llm import Engine
    from gpt_fast.load.engine import load_parts, start_following

    config = EngineConfig(
        checkpoint_path=str(args.checkpoint_path),
        device=args.device,
        dtype=args.dtype,
        max_seq_len=args.max_seq_length,
        max_num_seqs=args.batch_size,
        kv_cache=args.kv_cache,
        compile=args.compile,
        compile_prefill=args.compile,
    )
    if group is not None and not group.leads:
        start_following(config, group)()
        return None
    engine = Engine(load_parts(config, group))
    results = evaluate(EngineLM(engine), args.tasks, limit=args.limit, num_fewshot=args.num_fewshot)
    figures = {task: numbers(values) for task, values in results.get("results", {}).items()}
    for task, values in figures.items():
        print(f"{task}: " + ", ".join(f"{name} {value:.4f}" for name, value in values.items()))
    path = engine.description.path
    return {"checkpoint": str(args.checkpoint_path), "path": path, "limit": args.limit, "results": figures}


def numbers(values: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in values.items() if isinstance(value, float)}


if __name__ == "__main__":
    main()
