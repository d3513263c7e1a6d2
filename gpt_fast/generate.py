"""gpt-fast generate: gpt-fast's own command line over the engine.

gpt-fast generate --checkpoint_path DIR --prompt "Hello, my name is"
gpt-fast generate --checkpoint_path DIR --interactive
gpt-fast generate --checkpoint_path DIR --draft_checkpoint_path DRAFT --batch_size N   # how good is it?
torchrun --standalone --nproc_per_node=N -m gpt_fast.generate --checkpoint_path DIR ...     # one model on N ranks
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from gpt_fast.cli.errors import at_least
from gpt_fast.cli.parser import CommandParser
from gpt_fast.cli.quiet_gc import at_rest
from gpt_fast.config import EngineConfig, SamplingParams

with at_rest():
    import torch

    from gpt_fast.chat import converse
    from gpt_fast.convert.named import CHECKPOINT_HELP, checkpoint_to_serve, converted
    from gpt_fast.engine import ranks
    from gpt_fast.engine.fixed_choice import speculating
    from gpt_fast.engine.ranks import Group
    from gpt_fast.llm import Engine
    from gpt_fast.load.engine import load_parts, start_following
    from gpt_fast.speculative.costs import Choice
    from gpt_fast.speculative.speculator import Totals


def parser() -> CommandParser:
    flags = CommandParser(prog="gpt-fast generate", description=__doc__)
    flags.add_argument("--checkpoint_path", required=True, help=CHECKPOINT_HELP)
    flags.add_argument("--prompt", default="Hello, my name is", help="a text to continue")
    flags.add_argument("--interactive", action="store_true", help="chat with the model's own chat template")
    flags.add_argument("--num_samples", type=at_least(1), default=5, help="times the prompt is answered")
    flags.add_argument("--max_new_tokens", type=at_least(1), default=200, help="of an answer")
    flags.add_argument("--batch_size", type=at_least(1), default=1, help="rows decoded together, each its own seed")
    flags.add_argument("--top_k", type=int, default=200, help="draw from so many of the likeliest tokens; 0: from all")
    flags.add_argument("--top_p", type=float, default=1.0, help="draw from the likeliest tokens of this share together")
    flags.add_argument("--temperature", type=float, default=0.8, help="0 is greedy")
    flags.add_argument("--seed", type=int, default=None, help="row r of sample n draws from seed + n * rows + r")
    flags.add_argument("--draft_checkpoint_path", default=None, help="a model of the same vocabulary that proposes")
    flags.add_argument("--speculate_k", type=int, default=5, help="proposals of one step; ngram and auto: at most")
    flags.add_argument(
        "--speculate",
        choices=("none", "draft", "ngram", "auto"),
        default=None,
        help="draft (where one is named): in every step, whether or not that pays; ngram, auto (both): where it pays",
    )
    flags.add_argument("--compile", action="store_true", help="compile decoding")
    flags.add_argument("--compile_prefill", action="store_true", help="compile the prompt's forward too")
    flags.add_argument("--profile", type=Path, default=None, help="write a Chrome trace of the last sample here")
    flags.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N, mps")
    flags.add_argument("--dtype", default="auto", help="auto (the checkpoint's), float32, bfloat16, float16")
    flags.add_argument("--kv_cache", default="auto", help="auto, float32, bfloat16, float16, int8")
    flags.add_argument("--kernels", default="auto", help="auto (fused where there is one), plain")
    flags.add_argument("--max_seq_len", type=int, default=0, help="0: the model's own, at most 8192")
    return flags


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    return parser().parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    ranks.run_command(lambda group: run(parse_args(argv), group))


def run(args: argparse.Namespace, group: Group | None) -> None:
    """The command itself, in one process or on rank 0 of a group, whose other ranks compute with it."""
    config = engine_config(args, quiet=group is not None and not group.leads)
    if group is not None and not group.leads:
        return start_following(config, group)()
    engine = load(config, group)
    with drafting(engine, args):
        converse(engine, sampling(args, sample=0, row=0)) if args.interactive else samples(engine, args)


def engine_config(args: argparse.Namespace, *, quiet: bool = False) -> EngineConfig:
    """quiet: not to say which of a directory's files is taken."""
    draft = args.draft_checkpoint_path
    return EngineConfig(
        checkpoint_path=str(
            checkpoint_to_serve(args.checkpoint_path, kv_cache=args.kv_cache, dtype=args.dtype, quiet=quiet)
        ),
        dtype=args.dtype,
        device=args.device,
        kv_cache=args.kv_cache,
        kernels=args.kernels,
        max_seq_len=args.max_seq_len,
        max_num_seqs=args.batch_size,
        compile=args.compile,
        compile_prefill=args.compile_prefill,
        draft_checkpoint_path=None if draft is None else str(converted(draft)),
        speculate=args.speculate,
        speculate_k=args.speculate_k,
    )


def load(config: EngineConfig, group: Group | None) -> Engine:
    print("Loading model ...", flush=True)
    engine = Engine(load_parts(config, group))
    told = engine.description
    print(f"Time to load and warm up: {told.load_seconds:.2f} seconds. {told.as_dict()}")
    return engine


def drafting(engine: Engine, args: argparse.Namespace) -> AbstractContextManager[None]:
    """A draft that is named proposes in every step, for that is what was asked; `--speculate auto` asks what pays."""
    always = args.draft_checkpoint_path and args.speculate in (None, "draft")
    return speculating(engine.core, Choice("draft", args.speculate_k)) if always else nullcontext()


def sampling(args: argparse.Namespace, *, sample: int, row: int) -> SamplingParams:
    seed = None if args.seed is None else args.seed + sample * args.batch_size + row
    return SamplingParams(
        max_new_tokens=args.max_new_tokens, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, seed=seed
    )


# ------------------------------------------------------------------------------------------ samples


def samples(engine: Engine, args: argparse.Namespace) -> None:
    """gpt-fast's loop: the same prompt num_samples times, with figures after each and their mean at the end.

    Where tokens are proposed, each sample is decoded plainly too, in turn, for what speculation brings.
    """
    prompt = engine.encode(args.prompt)
    print(f"Prompt length: {len(prompt)}")
    speculative = engine.core.speculator is not None
    plain, rates = [], []
    for index in range(args.num_samples):
        if speculative:
            with engine.core.with_speculator(None):
                plain.append(decode(engine, prompt, args, index, streamed=False).rate)
        profiled = args.profile is not None and index == args.num_samples - 1
        with torch.profiler.profile() if profiled else nullcontext() as profiler:
            rates.append(one_sample(engine, prompt, args, index))
        if profiler:
            profiler.export_chrome_trace(str(args.profile))
            print(f"Profile written to {args.profile}")
    print("==========")
    if totals := engine.speculation_totals():
        print(acceptance(totals))
    print(f"Batch Size: {args.batch_size}")
    print(f"Prompt Length: {len(prompt)}")
    print(f"Average tokens/sec: {mean(rates):.2f}")
    if speculative:
        print(f"Plain tokens/sec: {mean(plain):.2f}; speculative: {mean(rates) / mean(plain):.2f} times as fast")
    print(f"Memory used: {memory_used(torch.device(engine.description.device)) / 1e9:.2f} GB")


class Sample(NamedTuple):
    """What all rows said, and when: seconds from the start to the first token, and to the last."""

    texts: list[str]
    tokens: int
    first: float
    last: float

    @property
    def rate(self) -> float:
        """Decoded tokens a second, all rows together; the first of each row is its prompt's."""
        decoded = self.tokens - len(self.texts)
        return decoded / (self.last - self.first) if decoded > 0 else self.tokens / self.last


def decode(engine: Engine, prompt: list[int], args: argparse.Namespace, index: int, *, streamed: bool) -> Sample:
    """Decode one sample of every row. streamed: a lone row's text is printed as it comes."""
    for row in range(args.batch_size):
        engine.add(f"row-{row}", prompt, sampling(args, sample=index, row=row))
    texts = [args.prompt] * args.batch_size
    started = time.perf_counter()
    first = count = 0
    while not engine.idle:
        for event in engine.step():
            texts[int(event.request_id.removeprefix("row-"))] += event.text
            if streamed:
                print(event.text, end="", flush=True)
            first = first or time.perf_counter()  # type: ignore[assignment]
            count += 1
    return Sample(texts, count, first - started, time.perf_counter() - started)


def one_sample(engine: Engine, prompt: list[int], args: argparse.Namespace, index: int) -> float:
    """Decode one sample of every row, print it and its figures; returns decoded tokens a second, all rows."""
    alone = args.batch_size == 1
    if alone:
        print(args.prompt, end="", flush=True)
    sample = decode(engine, prompt, args, index, streamed=alone)
    for row, text in enumerate([] if alone else sample.texts):
        print(f"\n--- row {row}\n{text}")
    told = engine.description
    read = told.weight_bytes_per_step if args.temperature else told.greedy_bytes_per_step
    print(
        f"\nTime for inference {index + 1}: {sample.last:.2f} sec total, {sample.rate:.2f} tokens/sec, "
        f"TTFT {sample.first * 1000:.1f} ms"
    )
    print(f"Bandwidth achieved: {read * sample.rate / args.batch_size / 1e9:.2f} GB/s")
    return sample.rate


def acceptance(totals: Totals) -> str:
    """gpt-fast's two lines, shares of the blocks of which 0, 1, ... proposals were accepted and how many were on
    average; then how often each proposal was accepted when those before it were."""
    if not totals.steps:
        return "Acceptance: nothing was proposed: answers are too short, or (ngram, auto) nothing was expected to pay"
    shares = [round(count / totals.steps, 4) for count in totals.blocks]
    places = ", ".join(f"{i}: {a / max(n, 1):.2f} of {n}" for i, (n, a) in enumerate(totals.positions, 1))
    return (
        f"Acceptance probs: {shares}\nMean Accepted: {totals.accepted / totals.steps:.4f}\n"
        f"Acceptance by position: {places}"
    )


def memory_used(device: torch.device) -> int:
    """Peak bytes: allocated on a GPU, else this process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
