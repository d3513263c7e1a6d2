"""gpt-fast draft: prove that speculation is lossless, choose a draft model, and see what it brings.

    gpt-fast draft verify --checkpoint_path TARGET --draft_checkpoint_path DRAFT
    gpt-fast draft report --checkpoint_path TARGET --draft_checkpoint_path DRAFT [DRAFT ...] --plot out.png
    gpt-fast draft speed --checkpoint_path TARGET --speculate ngram auto --draft_checkpoint_path DRAFT
    gpt-fast draft speed --checkpoint_path TARGET --useless_draft 2
    gpt-fast draft random --like TARGET --layers 4 --out_dir DIR

Without --draft_checkpoint_path they are about prompt lookup. The last line printed is JSON. docs/speculation.md states
the formulas. verify exits with 1 when a check fails.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from gpt_fast.cli.errors import at_least, one_line_errors
from gpt_fast.cli.parser import CommandParser
from gpt_fast.config import ConfigError, SamplingParams, check_int
from gpt_fast.convert.named import CHECKPOINT_HELP, converted
from gpt_fast.draft.assess import DraftReport, assess_draft
from gpt_fast.draft.lossless import Check, check_greedy, check_sampled
from gpt_fast.draft.prompts import SHIPPED, Prompt, read_prompts
from gpt_fast.draft.random_model import write_random_model
from gpt_fast.draft.speed import compare, json_of, print_ratios, take_turns, variants
from gpt_fast.draft.synthetic import force_acceptance
from gpt_fast.draft.tables import plot, print_comparison, print_report
from gpt_fast.files import write_json
from gpt_fast.llm import Engine
from gpt_fast.measure import machine
from gpt_fast.measure.picture import picture_path
from gpt_fast.measure.stats import FOREIGN_LIMIT
from gpt_fast.speculative.costs import Choice


def parser() -> CommandParser:
    flags = CommandParser(prog="gpt-fast draft", description=__doc__)
    commands = flags.add_subparsers(dest="command", required=True)
    verify = commands.add_parser("verify", help="prove on these models that speculation is lossless")
    add_common(verify, several_drafts=False)
    verify.add_argument("--answers", type=at_least(2), default=512, help="sampled answers of the distribution tests")
    verify.add_argument("--temperature", type=float, default=1.0, help="of the sampled answers")
    verify.add_argument("--top_k", type=int, default=0, help="0: all tokens")
    verify.add_argument("--top_p", type=float, default=1.0, help="share of the likeliest tokens")
    report = commands.add_parser("report", help="what drafts would bring on this machine")
    add_common(report, several_drafts=True)
    report.add_argument("--batch_sizes", type=at_least(1), nargs="+", default=[1, 2, 4, 8, 16], help="rows")
    report.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0], help="each of them")
    report.add_argument("--repeat", type=at_least(1), default=3, help="turns of plain decode and speculation")
    forced = "for models of random weights: accept proposals at this rate, at temperature 1"
    report.add_argument("--synthetic_acceptance", type=float, metavar="A", help=forced)
    report.add_argument("--plot", type=picture_path, help="write a picture here (needs matplotlib)")
    speed = commands.add_parser("speed", help="plain decode and speculation by turns")
    add_common(speed, several_drafts=False)
    speed.set_defaults(speculate_k=8)
    add_speed(speed)
    made = commands.add_parser("random", help="write a model of random weights")
    made.add_argument("--like", type=Path, required=True, help="a converted checkpoint: sizes and tokenizer")
    made.add_argument("--layers", type=at_least(1), required=True, help="how many it has")
    made.add_argument("--out_dir", type=Path, required=True, help="the checkpoint directory to write")
    made.add_argument("--seed", type=int, default=0, help="of the weights")
    return flags


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    return parser().parse_args(argv, argparse.Namespace(arguments=sys.argv[1:] if argv is None else argv))


def add_speed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--speculate", nargs="+", default=["auto"], choices=["ngram", "draft", "auto"], help="who")
    parser.add_argument("--useless_draft", type=at_least(0), default=0, metavar="LAYERS", help="of random weights")
    parser.add_argument("--batch_size", type=at_least(1), default=1, help="rows decoded together")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.8], help="each of them")
    parser.add_argument("--repeat", type=at_least(1), default=5, help="rounds, after a discarded one")
    parser.add_argument("--foreign_limit", type=float, default=FOREIGN_LIMIT, help="of the CPUs; above it: dropped")
    parser.add_argument("--out", type=Path, help="write the JSON here too")


def add_common(parser: argparse.ArgumentParser, *, several_drafts: bool) -> None:
    parser.add_argument("--checkpoint_path", required=True, help=f"the target: {CHECKPOINT_HELP}")
    parser.add_argument("--draft_checkpoint_path", default=[], nargs="+" if several_drafts else 1, help="the draft")
    parser.add_argument("--speculate_k", type=int, default=8 if several_drafts else 4, help="proposals of a step")
    parser.add_argument("--prompts", type=Path, default=SHIPPED, help='JSON lines of {"category": ..., "prompt": ...}')
    parser.add_argument("--each", type=at_least(0), default=0, help="prompts of a category at most; 0: all")
    parser.add_argument("--max_new_tokens", type=at_least(1), default=64, help="of an answer")
    parser.add_argument("--max_seq_len", type=int, default=1024, help="tokens of prompt and answer")
    parser.add_argument("--dtype", default="auto", help="auto (the checkpoint's), float32, bfloat16, float16")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N, mps")
    parser.add_argument("--threads", type=int, default=0, help="0: one a core")
    parser.add_argument("--compile", action="store_true", help="compile decoding")


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    with one_line_errors():
        name_checkpoints(args)
        passed = COMMANDS[args.command](args)
    sys.exit(0 if passed else 1)


def name_checkpoints(args: argparse.Namespace) -> None:
    """In place of what the user named, the converted checkpoints."""
    if args.command == "random":
        args.like = converted(str(args.like))
    else:
        args.checkpoint_path = str(converted(args.checkpoint_path))
        args.draft_checkpoint_path = [str(converted(draft)) for draft in args.draft_checkpoint_path]


def load(args: argparse.Namespace, draft: str | None, *, slots: int, speculate: str = "") -> Engine:
    return Engine.load(
        args.checkpoint_path,
        draft_checkpoint_path=draft,
        speculate=speculate or ("draft" if draft else "ngram"),
        speculate_k=args.speculate_k,
        max_num_seqs=slots,
        max_seq_len=args.max_seq_len,
        dtype=args.dtype,
        device=args.device,
        threads=args.threads,
        compile=args.compile,
    )


def prompts_of(args: argparse.Namespace, engine: Engine) -> list[Prompt]:
    check_int("max_new_tokens", args.max_new_tokens, 1, args.max_seq_len - 1)  # the prompts get the rest
    return read_prompts(args.prompts, engine, longest=args.max_seq_len - args.max_new_tokens, each=args.each)


def verify(args: argparse.Namespace) -> bool:
    params = SamplingParams(
        max_new_tokens=args.speculate_k + 3,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        ignore_eos=True,
    )
    draft = next(iter(args.draft_checkpoint_path), None)
    engine = load(args, draft, slots=16)
    core, choice = engine.core, Choice("draft" if draft else "ngram", args.speculate_k)
    tokens = [p.tokens for p in prompts_of(args, engine)]
    checks: list[Check] = []

    def show(found: Sequence[Check]) -> None:
        checks.extend(found)
        print(*found, sep="\n", flush=True)

    show([check_greedy(core, choice, tokens, max_new_tokens=args.max_new_tokens)])
    for prompt in tokens[:: max(len(tokens) // 2, 1)][:2]:
        show(check_sampled(core, choice, prompt, params, answers=args.answers // 2))
    passed = all(check.passed for check in checks)
    print("lossless: every check passed" if passed else "NOT lossless: see the checks that failed")
    result = {
        "passed": passed,
        "target": engine.description.checkpoint,
        "draft": draft or "ngram",
        "k": args.speculate_k,
        "checks": [check.json() for check in checks],
    }
    print(json.dumps(result))
    return passed


def report(args: argparse.Namespace) -> bool:
    reports: list[DraftReport] = []
    for draft in args.draft_checkpoint_path or [None]:
        engine = load(args, draft, slots=max(args.batch_sizes))
        name, temperatures = draft or "ngram", args.temperatures
        if args.synthetic_acceptance is not None:
            force_acceptance(engine.core, args.synthetic_acceptance)
            name, temperatures = f"{name} (synthetic acceptance {args.synthetic_acceptance:g})", [1.0]
        found = assess_draft(
            engine.core,
            name,
            prompts_of(args, engine),
            batch_sizes=args.batch_sizes,
            temperatures=temperatures,
            max_new_tokens=args.max_new_tokens,
            repeat=args.repeat,
        )
        print_report(found)
        reports.append(found)
        del engine
    print_comparison(reports)
    if args.plot:
        plot(reports, args.plot)
    print(json.dumps({"target": args.checkpoint_path, "drafts": [r.json() for r in reports]}))
    return True


def speed(args: argparse.Namespace) -> bool:
    with draft_of(args) as draft:
        engine = load(args, draft, slots=args.batch_size, speculate="auto" if draft else "ngram")
    rounds = take_turns(
        engine.core,
        variants(engine.core, args.speculate),
        prompts_of(args, engine),
        rows=args.batch_size,
        temperatures=args.temperatures,
        max_new_tokens=args.max_new_tokens,
        repeat=args.repeat,
    )
    ratios = compare(rounds, limit=args.foreign_limit)
    if not ratios:
        raise ConfigError("foreign_limit", "other programs were busy in every pair of turns", got=args.foreign_limit)
    print_ratios(ratios)
    told = machine.description("python -m gpt_fast.draft", args.arguments)
    result = told | {"engine": engine.description.as_dict(), "draft": draft, "ratios": json_of(ratios)}
    if args.out:
        write_json(result, args.out)
    print(json.dumps(result))
    return True


@contextmanager
def draft_of(args: argparse.Namespace) -> Iterator[str | None]:
    """The draft's checkpoint; one of random weights lasts as long as the context."""
    if not args.useless_draft:
        yield next(iter(args.draft_checkpoint_path), None)
        return
    if args.draft_checkpoint_path:
        raise ValueError("--draft_checkpoint_path: has no effect: --useless_draft makes a draft")
    with tempfile.TemporaryDirectory(prefix="gpt-fast-random-") as directory:
        like = directory_of(Path(args.checkpoint_path))
        yield str(write_random_model(like, Path(directory) / "draft", layers=args.useless_draft))


def directory_of(checkpoint: Path) -> Path:
    return checkpoint.parent if checkpoint.is_file() else checkpoint


def random_model(args: argparse.Namespace) -> bool:
    print(write_random_model(directory_of(args.like), args.out_dir, layers=args.layers, seed=args.seed))
    return True


COMMANDS = {"verify": verify, "report": report, "speed": speed, "random": random_model}

if __name__ == "__main__":
    main()
