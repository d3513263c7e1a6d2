"""gpt-fast batch: a file of requests, answered in one go, each once.

gpt-fast batch --input prompts.jsonl --output answers.jsonl --checkpoint_path DIR

A line of the input is one of OpenAI's batch files ({"custom_id": ..., "method": "POST", "url": "/v1/chat/completions",
"body": {...}}) or a body alone: {"prompt": ...} for completions, {"messages": ...} for chats. A .parquet file has such
columns. The output has a line for each, in the same order, as OpenAI's; a line that cannot be answered says why.

The same command goes on where it was stopped or killed: what is answered is kept in OUTPUT.partial.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from gpt_fast.batch.batch_file import Input, Row, check_pyarrow, is_parquet, open_input
from gpt_fast.batch.journal import Journal
from gpt_fast.batch.lines import failed
from gpt_fast.cli.errors import at_least, one_line_errors
from gpt_fast.cli.parser import CommandParser
from gpt_fast.cli.quiet_gc import at_rest
from gpt_fast.config import ConfigError, EngineConfig
from gpt_fast.serve.model_config import MODEL_NAME, ServeConfig
from gpt_fast.serve.model_flags import add_model_flags, read_configs


def parser() -> CommandParser:
    flags = CommandParser(prog="gpt-fast batch", description=__doc__)
    add = flags.add_argument
    add("--input", type=Path, required=True, metavar="FILE", help=".jsonl, or .parquet (with pyarrow)")
    add("--output", type=Path, required=True, metavar="FILE", help=".jsonl, or .parquet")
    add("--defaults", type=json_object, metavar="JSON", help="fields of the bodies that do not have them")
    add("--seed", type=int, default=0, help="the requests without a seed get theirs of it and of their line's number")
    add("--workers", type=at_least(1), default=1, metavar="N", help="engines: a GPU each, or a share of the cores")
    add_model_flags(flags)
    return flags


def json_object(value: str) -> dict[str, Any]:
    """A type for argparse."""
    try:
        fields = json.loads(value)
    except ValueError:
        fields = None
    if not isinstance(fields, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object (got {value[:60]!r})")
    return fields


def refuse_ranks(yaml: dict[str, Any]) -> None:
    if yaml.get("parallelType"):
        raise ConfigError("parallelType", "ranks answer no batches", allowed="a file without it; --workers for engines")


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
    with one_line_errors("gpt-fast batch"):
        for path in (args.input, args.output):
            if is_parquet(path):
                check_pyarrow(path)
        configs = read_configs(args, refuse_ranks)
        given = open_input(args.input)
        with at_rest():
            from gpt_fast.serve.startup import with_weights
        engine_config = with_weights(configs[0])
        errors = run(args, given, engine_config, configs[1])
    sys.exit(1 if errors else 0)


def run(args: argparse.Namespace, given: Input, engine_config: EngineConfig, serve_config: ServeConfig) -> int:
    """Answer all that is not answered; returns how many lines tell of an error."""
    from gpt_fast.batch.answering import Plan

    names = serve_config.model_names or (MODEL_NAME,)
    plan = Plan(given.sha256, args.seed, args.defaults or {}, names)
    with Journal(args.output, identity(plan, engine_config), last=given.last) as journal:
        try:
            answer(args, given, journal, engine_config, plan)
        except KeyboardInterrupt:
            left = given.count - journal.done
            print(
                f"gpt-fast batch: stopped, {left} of {given.count} are left; the same command goes on", file=sys.stderr
            )
            raise
        if left := given.count - journal.done:
            raise ValueError(f"no worker is left, and {left} of {given.count} lines are; the same command goes on")
        errors = sum(map(failed, journal.lines()))
        journal.finish()
    told = f"; {errors} of them tell of an error" if errors else ""
    print(f"{args.output}: {given.count} answers{told}", file=sys.stderr)
    return errors


def answer(args: argparse.Namespace, given: Input, journal: Journal, engine_config: EngineConfig, plan: Any) -> None:
    from gpt_fast.batch.dealer import Dealer, Done
    from gpt_fast.batch.local import answer_here, answer_in_processes

    if journal.done == given.count:
        return
    started, tokens = 0.0, 0
    with progress_bar(journal.done, given.count) as bar:

        def told(done: Done) -> None:
            nonlocal tokens
            tokens += done.tokens
            bar.set_postfix_str(f"{tokens / (time.monotonic() - started):.0f} tokens/s", refresh=False)
            bar.update()

        def left() -> Iterator[Row]:
            nonlocal started
            started = time.monotonic()  # an engine has been loaded and asks
            yield from (row for row in given.rows() if row[0] not in journal)

        dealer = Dealer(left(), journal, told)
        if args.workers == 1:
            answer_here(dealer, engine_config, plan)
        else:
            answer_in_processes(dealer, engine_config, plan, args.workers)


def progress_bar(done: int, total: int) -> tqdm[Any]:
    """On a terminal drawn again and again; in a log a line now and then."""
    terminal = sys.stderr.isatty()
    return tqdm(total=total, initial=done, unit=" answers", mininterval=0.2 if terminal else 30, dynamic_ncols=terminal)


def identity(plan: Any, config: EngineConfig) -> Mapping[str, Any]:
    """What must be the same for answers to go together."""
    from gpt_fast.checkpoint.quality_gate import weights_sha256

    return {
        "input sha256": plan.input_sha256,
        "weights sha256": weights_sha256(Path(config.checkpoint_path)),
        "model": list(plan.model_names),
        "seed": plan.seed,
        "defaults": dict(plan.defaults),
        "device": config.device,
        "dtype": config.dtype,
        "kv_cache": config.kv_cache,
        "max_seq_len": config.max_seq_len,
    }


if __name__ == "__main__":
    main()
