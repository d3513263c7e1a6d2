"""python -m gpt_fast.draft: prove that speculation is lossless, and choose a draft model.

    python -m gpt_fast.draft verify --checkpoint_path TARGET --draft_checkpoint_path DRAFT
    python -m gpt_fast.draft report --checkpoint_path TARGET --draft_checkpoint_path DRAFT [DRAFT ...] --plot out.png

Without --draft_checkpoint_path both judge prompt lookup. The last line printed is JSON. docs/speculation.md states
the formulas. verify exits with 1 when a check fails.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from gpt_fast.config import ConfigError, SamplingParams
from gpt_fast.controller import Choice
from gpt_fast.draft.prompts import SHIPPED, read_prompts
from gpt_fast.draft.report import DraftReport, judge_draft, plot, print_report
from gpt_fast.draft.verify import Check, check_greedy, check_sampled
from gpt_fast.llm import Engine


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m gpt_fast.draft", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    verify = commands.add_parser("verify", help="prove on these models that speculation is lossless")
    add_common(verify, several_drafts=False)
    verify.add_argument("--answers", type=int, default=512, help="sampled answers of the distribution tests")
    verify.add_argument("--temperature", type=float, default=1.0)
    verify.add_argument("--top_k", type=int, default=0)
    verify.add_argument("--top_p", type=float, default=1.0)
    report = commands.add_parser("report", help="what drafts would bring on this machine")
    add_common(report, several_drafts=True)
    report.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    report.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0])
    report.add_argument("--plot", type=Path, default=None, help="write a figure here (needs matplotlib)")
    return parser.parse_args(argv)


def add_common(parser: argparse.ArgumentParser, *, several_drafts: bool) -> None:
    parser.add_argument("--checkpoint_path", required=True, help="the target")
    parser.add_argument("--draft_checkpoint_path", default=[], nargs="+" if several_drafts else 1)
    parser.add_argument("--speculate_k", type=int, default=8 if several_drafts else 4)
    parser.add_argument("--prompts", type=Path, default=SHIPPED, help='JSON lines of {"category": ..., "prompt": ...}')
    parser.add_argument("--each", type=int, default=0, help="prompts of a category at most; 0: all")
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--max_seq_len", type=int, default=1024)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--compile", action="store_true")


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        passed = verify(args) if args.command == "verify" else report(args)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    sys.exit(0 if passed else 1)


def load(args: argparse.Namespace, draft: str | None, *, slots: int) -> Engine:
    return Engine.load(
        args.checkpoint_path,
        draft_checkpoint_path=draft,
        speculate="draft" if draft else "ngram",
        speculate_k=args.speculate_k,
        max_num_seqs=slots,
        max_seq_len=args.max_seq_len,
        dtype=args.dtype,
        device=args.device,
        threads=args.threads,
        compile=args.compile,
    )


def verify(args: argparse.Namespace) -> bool:
    draft = next(iter(args.draft_checkpoint_path), None)
    engine = load(args, draft, slots=16)
    core, choice = engine.core, Choice("draft" if draft else "ngram", args.speculate_k)
    prompts = read_prompts(args.prompts, engine, longest=args.max_seq_len - args.max_new_tokens, each=args.each)
    tokens = [p.tokens for p in prompts]
    checks: list[Check] = []

    def show(found: Sequence[Check]) -> None:
        checks.extend(found)
        print(*found, sep="\n", flush=True)

    show([check_greedy(core, choice, tokens, max_new_tokens=args.max_new_tokens)])
    params = SamplingParams(
        max_new_tokens=args.speculate_k + 3, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p,
        ignore_eos=True,
    )  # fmt: skip
    for prompt in tokens[:: max(len(tokens) // 2, 1)][:2]:
        show(check_sampled(core, choice, prompt, params, answers=args.answers // 2))
    passed = all(check.passed for check in checks)
    print("lossless: every check passed" if passed else "NOT lossless: see the checks that failed")
    print(json.dumps({"passed": passed, "target": engine.description["checkpoint"], "draft": draft or "ngram",
                      "k": args.speculate_k, "checks": [check.json() for check in checks]}))  # fmt: skip
    return passed


def report(args: argparse.Namespace) -> bool:
    reports: list[DraftReport] = []
    for draft in args.draft_checkpoint_path or [None]:
        engine = load(args, draft, slots=max(args.batch_sizes))
        prompts = read_prompts(args.prompts, engine, longest=args.max_seq_len - args.max_new_tokens, each=args.each)
        found = judge_draft(
            engine.core, draft or "ngram", prompts, batch_sizes=args.batch_sizes, temperatures=args.temperatures,
            max_new_tokens=args.max_new_tokens,
        )  # fmt: skip
        print_report(found)
        reports.append(found)
        del engine
    if args.plot:
        plot(reports, args.plot)
    print(json.dumps({"target": args.checkpoint_path, "drafts": [r.json() for r in reports]}))
    return True


if __name__ == "__main__":
    main()
