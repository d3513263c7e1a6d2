"""The command: which rows, in which order, and what becomes of them."""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from gpt_fast.bench.gpu import peers, roofline, rows
from gpt_fast.bench.gpu.ceilings import ceilings
from gpt_fast.bench.gpu.cold import cold_start
from gpt_fast.bench.gpu.models import FORMATS, SHAPES, TINY, random_model, rank_config
from gpt_fast.cli.errors import at_least, one_line_errors
from gpt_fast.cli.parser import CommandParser
from gpt_fast.config import ModelConfig
from gpt_fast.files import write_json
from gpt_fast.measure import machine
from gpt_fast.measure.picture import picture_path

KINDS = ("ceilings", "decode", "allocated", "verify", "prefill", "sampler", "cold", "peers")
SAMPLER_VOCABULARY = 128256
Measure = Callable[[], Any]  # figures, or a list of them


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    with one_line_errors():
        if not args.dry_run and not torch.cuda.is_available():
            raise ValueError("no CUDA device: --gpu measures one (--dry-run runs everything small on the CPU)")
        result = Bench(args).run()
        print(roofline.table(result))
        if args.plot:
            roofline.plot(result, args.plot)
        print(json.dumps(result))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(prog="gpt-fast bench --gpu", description=__doc__)
    add = parser.add_argument
    add("--only", nargs="+", choices=KINDS, default=list(KINDS), help="kinds of rows")
    add("--models", nargs="+", choices=[*SHAPES], default=[*SHAPES], help="by shape")
    add("--formats", nargs="+", choices=FORMATS, default=["bf16", "int8", "int4"], help="of the weights")
    add("--tp", nargs="+", type=at_least(1), default=[1], metavar="N", help="rank 0's share of N; sums are left out")
    add("--kv_cache", nargs="+", choices=("auto", "int8"), default=["auto"], help="auto: as the activations")
    add("--batch_size", nargs="+", type=at_least(1), default=[1, 4, 16], metavar="N", help="rows")
    add("--context", nargs="+", type=at_least(1), default=[128, 1024, 8192, 32768], metavar="N", help="cached already")
    add("--widths", nargs="+", type=at_least(1), default=[1, 5, 8], metavar="M", help="tokens of a verification")
    add("--prompt", nargs="+", type=at_least(1), default=[512, 4096], metavar="N", help="of a prefill")
    add("--chunk", type=at_least(1), default=512, help="of a prefill, tokens")
    add("--new_tokens", type=at_least(1), default=64, help="of each decode")
    add("--steps", type=at_least(1), default=8, help="tokens of a CUDA graph replay")
    add("--repeat", type=at_least(1), default=5, help="rounds")
    add("--probe_gib", type=float, default=4.0, help="buffer of the ceilings")
    add("--peer_dir", type=Path, help="a checkout of meta-pytorch/gpt-fast")
    add("--dry-run", action="store_true", help="a tiny model on the CPU: every code path, no figure worth anything")
    add("--out", type=Path, help="write the JSON here, anew after every row")
    add("--plot", type=picture_path, help="write the roofline here (needs matplotlib)")
    given = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(given, argparse.Namespace(arguments=["--gpu", *given]))
    return shrunk(args) if args.dry_run else args


def shrunk(args: argparse.Namespace) -> argparse.Namespace:
    """The same rows, so small that a CPU runs them in seconds."""
    small = {
        "models": [*TINY],
        "batch_size": [1, 2],
        "context": [4, 40],
        "prompt": [20, 40],
        "chunk": 24,
        "new_tokens": 5,
        "steps": 2,
        "repeat": 1,
        "probe_gib": 2**-8,
    }
    return argparse.Namespace(**(vars(args) | small))


class Bench:
    """Rows, measured one after the other; `result` is written after each."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = torch.device("cpu" if args.dry_run else "cuda")
        self.dtype = torch.float32 if args.dry_run else torch.bfloat16
        self.effort = rows.Effort(repeat=args.repeat, new_tokens=args.new_tokens, steps=args.steps)
        self.result: dict[str, Any] = describe(args, self.device) | {"ceilings": None, "rows": []}

    def run(self) -> dict[str, Any]:
        only, args = self.args.only, self.args
        if "ceilings" in only:
            self.result["ceilings"] = ceilings(self.device, int(args.probe_gib * 2**30), args.repeat)
            self.save()
        if "sampler" in only:
            vocabulary = 512 if args.dry_run else SAMPLER_VOCABULARY
            for count in args.batch_size:
                key = {"kind": "sampler", "rows": count}
                self.add(key, partial(rows.sampler, self.device, vocabulary, count, self.effort))
        for name in args.models:
            for form in args.formats:
                for ranks in args.tp:
                    self.model_rows(name, form, ranks)
        return self.result

    def model_rows(self, name: str, form: str, ranks: int) -> None:
        key: roofline.Row = {"model": name, "format": form}
        config = (SHAPES | TINY)[name]
        share = {"tp": ranks} if ranks > 1 else {}  # of which there is neither a peer nor a start
        if "cold" in self.args.only and not share:
            self.add({"kind": "cold", **key}, partial(cold_start, name, form, self.device.type))
        if {"decode", "allocated", "verify", "prefill"} & {*self.args.only}:
            self.subject_rows(key | share, rank_config(config, form, 0, ranks))
        self.free()
        if "peers" in self.args.only and not share:
            self.peer_rows(key, config)

    def subject_rows(self, key: roofline.Row, config: ModelConfig) -> None:
        """Everything that needs the model; it lives as long as this call."""
        form = key["format"]
        try:
            float_form = "bf16" if form == "fp8" else form
            subject = rows.Subject(random_model(config, float_form, self.device, self.dtype), fp8=form == "fp8")
        except Exception as error:  # the report says why; other models may fit
            self.note({"kind": "model", **key, "error": one_line(error)})
            return
        for cached in self.args.kv_cache:
            subject.kv_dtype = torch.int8 if cached == "int8" else self.dtype
            which = {"kv_cache": cached} if cached != "auto" else {}
            for kind, more, measure in self.plan(subject):
                if kind in self.args.only:
                    self.add({"kind": kind, **key, **which, **more}, measure)

    def plan(self, subject: rows.Subject) -> Iterator[tuple[str, roofline.Row, Measure]]:
        args, effort = self.args, self.effort
        for count in args.batch_size:
            for context in args.context:
                where = {"rows": count, "context": context}
                yield "decode", where, partial(rows.decode, subject, count, context, effort)
        first, most = min(args.context), max(args.context)
        yield "allocated", {"rows": 1, "context": first}, partial(rows.allocated, subject, first, most, effort)
        for context in (first, most):
            yield "verify", {"rows": 1, "context": context}, partial(rows.verify, subject, context, args.widths, effort)
        for prompt in args.prompt:
            yield "prefill", {"rows": 1, "prompt": prompt}, partial(rows.prefill, subject, prompt, args.chunk, effort)

    def peer_rows(self, key: roofline.Row, config: ModelConfig) -> None:
        form, found = key["format"], {}
        if find_spec("transformers") and form == "bf16":  # it has no quantization of its own
            found["transformers"] = peers.hf_transformers
        if self.args.peer_dir and form != "fp8":
            found["gpt-fast"] = partial(peers.upstream, form=form, checkout=self.args.peer_dir)
        compiled = self.device.type == "cuda"
        for name, peer in found.items():
            for context in self.args.context:
                row = {"kind": f"peer {name}", **key, "rows": 1, "context": context}
                self.add(row, partial(peer, config, context, self.effort, self.device, compiled=compiled))

    def add(self, key: roofline.Row, measure: Measure) -> None:
        """Measure, and note what came of it; a failure is a row too."""
        try:
            figures = measure()
        except Exception as error:  # whatever it is, the other rows are worth having
            figures = {"error": one_line(error)}
        self.free()
        for row in figures if isinstance(figures, list) else [figures]:
            self.note(key | row)

    def note(self, row: roofline.Row) -> None:
        self.result["rows"].append(row)
        roofline.finish(self.result["rows"], (self.result["ceilings"] or {}).get("read_gb_s"))
        print(roofline.line(row), flush=True)
        self.save()

    def save(self) -> None:
        if self.args.out:
            write_json(self.result, self.args.out)

    def free(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def one_line(error: Exception) -> str:
    text = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {text[0]}"[:300]


def describe(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    facts = machine.description("python -m gpt_fast.bench", args.arguments)
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "triton": version("triton")}
    name = "CPU twins (dry run)" if device.type == "cpu" else torch.cuda.get_device_name(device)
    return facts | versions | {"device": name, "steps_per_replay": args.steps, "repeat": args.repeat}


def version(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
