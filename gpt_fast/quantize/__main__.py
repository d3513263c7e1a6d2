"""gpt-fast quantize: write a quantized file beside a converted checkpoint."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch

from gpt_fast.checkpoint.hf_config import load_model_config
from gpt_fast.cli.errors import one_line_errors, refuse_useless
from gpt_fast.cli.parser import CommandParser
from gpt_fast.cli.progress import Bar
from gpt_fast.convert.named import CHECKPOINT_HELP, converted
from gpt_fast.convert.quantized import Calibration, Progress, quantize_checkpoint, repack_gguf
from gpt_fast.measure.calibration import LENGTH, WINDOWS, calibration
from gpt_fast.measure.texts import Text, calibration_part, default_text, file_text
from gpt_fast.quantize.gptq_model import GPTQOptions
from gpt_fast.quantize.scheme import QuantizationError
from gpt_fast.quantize.structure import MODES

BUILT_IN = "topics"
GPTQ_FLAGS = (
    "calibration_tasks",
    "calibration_text",
    "calibration_limit",
    "calibration_seq_length",
    "percdamp",
    "blocksize",
    "act_order",
)


def main(arguments: list[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    with one_line_errors():
        check_used(arguments, args)
        args.checkpoint_path = converted(str(args.checkpoint_path))
        with Bar(args.gguf.name if args.gguf else args.mode) as bar:
            path = run(args, bar)
    print(path)


def parser() -> CommandParser:
    flags = CommandParser(prog="gpt-fast quantize", description=__doc__)
    add = flags.add_argument
    add("--checkpoint_path", type=Path, required=True, help=CHECKPOINT_HELP)
    add("--mode", "-q", choices=MODES, default="int8", help="int4 rounds to nearest, int4-gptq calibrates on text")
    add("--groupsize", type=int, default=32, help="inputs that share a scale in int4: 32, 64, 128, 256")
    add("--gguf", type=Path, help="take this file's own Q4_0, Q4_1, Q8_0 blocks, without loss, instead of --mode")
    add("--embedding", choices=("auto", "int8", "keep"), default="auto", help="auto: int8 where the head shares it")
    add("--label", default="_", help="goes between the source's name and the mode in the file's name")
    add("--device", default="cpu", help="where to compute: cpu, cuda, cuda:1")
    gptq = flags.add_argument_group("int4-gptq")
    add = gptq.add_argument
    add(
        "--calibration_tasks",
        nargs="+",
        default=[BUILT_IN],
        metavar="TASK",
        help=f"lm-evaluation-harness tasks, or {BUILT_IN}: the help texts of this Python",
    )
    add("--calibration_text", type=Path, help="a UTF-8 file to use instead")
    add("--calibration_limit", type=int, default=WINDOWS, help="windows of text")
    add("--calibration_seq_length", type=int, default=LENGTH, help="tokens of a window")
    add("--percdamp", type=float, default=0.01, help="share of the Hessian's mean diagonal added to it")
    add("--blocksize", type=int, default=128, help="columns between updates of the whole matrix")
    add(
        "--act_order", action=argparse.BooleanOptionalAction, default=True, help="columns with the largest inputs first"
    )
    return flags


def check_used(arguments: list[str] | None, args: argparse.Namespace) -> None:
    """Refuse a flag that another one leaves without effect, naming both."""
    refuse = partial(refuse_useless, parser(), arguments)
    if args.gguf is not None:
        why = f"--gguf takes the blocks of {args.gguf.name} as they are"
        refuse(("mode", "groupsize", "embedding", "device", *GPTQ_FLAGS), why=why)
    if args.mode != "int4-gptq":
        refuse(GPTQ_FLAGS, why=f"--mode {args.mode} calibrates nothing (allowed with int4-gptq)")
    if args.mode == "int8":
        refuse(("groupsize",), why="--mode int8 has a scale a row (allowed with int4 and int4-gptq)")
    if args.calibration_text is not None:
        refuse(("calibration_tasks",), why="--calibration_text is read instead")


def run(args: argparse.Namespace, progress: Progress) -> Path:
    if args.gguf is not None:
        return repack_gguf(args.checkpoint_path, args.gguf, label=args.label, progress=progress)
    check_range("--percdamp", args.percdamp, 0.0, 1.0)
    check_range("--blocksize", args.blocksize, 1, 1 << 16)
    return quantize_checkpoint(
        args.checkpoint_path,
        mode=args.mode,
        groupsize=args.groupsize,
        embedding=args.embedding,
        label=args.label,
        device=parse_device(args.device),
        calibration=calibration_of(args) if args.mode == "int4-gptq" else None,
        gptq=GPTQOptions(percdamp=args.percdamp, blocksize=args.blocksize, act_order=args.act_order),
        progress=progress,
    )


def calibration_of(args: argparse.Namespace) -> Calibration:
    """Windows of the chosen text."""
    check_range("--calibration_limit", args.calibration_limit, 1, 1 << 20)
    directory = args.checkpoint_path if args.checkpoint_path.is_dir() else args.checkpoint_path.parent
    check_range("--calibration_seq_length", args.calibration_seq_length, 8, load_model_config(directory).max_position)
    return calibration(
        directory, calibration_text(args), limit=args.calibration_limit, length=args.calibration_seq_length
    )


def calibration_text(args: argparse.Namespace) -> Text:
    if args.calibration_text is not None:
        return file_text(args.calibration_text)
    if args.calibration_tasks == [BUILT_IN]:
        return calibration_part(default_text())
    from gpt_fast.eval.tasks import task_text

    return task_text(args.calibration_tasks)


def check_range(flag: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise QuantizationError(f"{flag}: out of range (got {value}, allowed {low}..{high})")


def parse_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise QuantizationError(f"--device: unknown device (got {name!r}, allowed cpu, cuda, cuda:N)")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise QuantizationError(
            f"--device: not on this machine (got {name}, allowed {torch.cuda.device_count()} CUDA devices)"
        )
    return device


if __name__ == "__main__":
    main()
