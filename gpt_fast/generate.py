"""python -m gpt_fast.generate: gpt-fast's command line over the engine.

python -m gpt_fast.generate --checkpoint_path DIR --prompt "Hello, my name is"
python -m gpt_fast.generate --checkpoint_path DIR --interactive
torchrun --standalone --nproc_per_node=N -m gpt_fast.generate --checkpoint_path DIR ...     # one model on N ranks
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Sequence
from pathlib import Path

from gpt_fast.cli.errors import at_least
from gpt_fast.cli.quiet_gc import at_rest
from gpt_fast.config import EngineConfig, SamplingParams

with at_rest():
    import torch

    from gpt_fast.engine import ranks
    from gpt_fast.engine.ranks import Group
    from gpt_fast.llm import Engine, TextEvent
    from gpt_fast.load.engine import load_parts
    from gpt_fast.speculative.speculator import Totals


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m gpt_fast.generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint_path", required=True, help="a converted checkpoint, or a weights file in it")
    parser.add_argument("--prompt", default="Hello, my name is")
    parser.add_argument("--interactive", action="store_true", help="chat with the model's own chat template")
    parser.add_argument("--num_samples", type=at_least(1), default=5)
    parser.add_argument("--max_new_tokens", type=at_least(1), default=200)
    parser.add_argument("--batch_size", type=at_least(1), default=1, help="rows decoded together, each its own seed")
    parser.add_argument("--top_k", type=int, default=200)
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy")
    parser.add_argument("--seed", type=int, default=None, help="row r of sample n draws from seed + n * rows + r")
    parser.add_argument("--draft_checkpoint_path", default=None, help="a model of the same vocabulary that proposes")
    parser.add_argument("--speculate_k", type=int, default=5, help="proposals of one step, at most")
    parser.add_argument("--speculate", choices=("none", "draft", "ngram", "auto"), default=None)
    parser.add_argument("--compile", action="store_true", help="compile decoding")
    parser.add_argument("--compile_prefill", action="store_true", help="compile the prompt's forward too")
    parser.add_argument("--profile", type=Path, default=None, help="write a Chrome trace of the last sample here")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N, mps")
    parser.add_argument("--dtype", default="auto", help="auto (the checkpoint's), float32, bfloat16, float16")
    parser.add_argument("--kv_cache", default="auto", help="auto, float32, bfloat16, float16, int8")
    parser.add_argument("--kernels", default="auto", help="auto (fused where there is one), plain")
    parser.add_argument("--max_seq_len", type=int, default=0, help="0: the model's own, at most 8192")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    ranks.run_command(lambda group: run(parse_args(argv), group))


def run(args: argparse.Namespace, group: Group | None) -> None:
    """The command itself, in one process or on every rank of a group: all do the same, and one is heard."""
    if group is not None:
        if args.interactive:
            raise ValueError("--interactive: is not there on several ranks; start it without torchrun")
        args.seed = group.agreed_seed() if args.seed is None else args.seed
        args.profile = None if group.ranks.rank else args.profile
    engine = load(args, group)
    chat(engine, args) if args.interactive else samples(engine, args)


def load(args: argparse.Namespace, group: Group | None) -> Engine:
    print("Loading model ...", flush=True)
    config = EngineConfig(
        checkpoint_path=args.checkpoint_path,
        dtype=args.dtype,
        device=args.device,
        kv_cache=args.kv_cache,
        kernels=args.kernels,
        max_seq_len=args.max_seq_len,
        max_num_seqs=args.batch_size,
        compile=args.compile,
        compile_prefill=args.compile_prefill,
        draft_checkpoint_path=args.draft_checkpoint_path,
        speculate=args.speculate,
        speculate_k=args.speculate_k,
    )
    engine = Engine(load_parts(config, group))
    told = engine.description
    print(f"Time to load and warm up: {told.load_seconds:.2f} seconds. {told.as_dict()}")
    return engine


def sampling(args: argparse.Namespace, *, sample: int, row: int) -> SamplingParams:
    seed = None if args.seed is None else args.seed + sample * args.batch_size + row
    return SamplingParams(
        max_new_tokens=args.max_new_tokens, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, seed=seed
    )


# ------------------------------------------------------------------------------------------ samples


def samples(engine: Engine, args: argparse.Namespace) -> None:
    """gpt-fast's loop: the same prompt num_samples times, with figures after each and their mean at the end."""
    prompt = engine.encode(args.prompt)
    print(f"Prompt length: {len(prompt)}")
    rates = []
    for index in range(args.num_samples):
        if args.profile is not None and index == args.num_samples - 1:
            with torch.profiler.profile() as profiler:
                rates.append(one_sample(engine, prompt, args, index))
            profiler.export_chrome_trace(str(args.profile))
            print(f"Profile written to {args.profile}")
        else:
            rates.append(one_sample(engine, prompt, args, index))
    print("==========")
    if totals := engine.speculation_totals():
        print(acceptance(totals))
    print(f"Batch Size: {args.batch_size}")
    print(f"Prompt Length: {len(prompt)}")
    print(f"Average tokens/sec: {sum(rates) / len(rates):.2f}")
    print(f"Memory used: {memory_used(torch.device(engine.description.device)) / 1e9:.2f} GB")


def one_sample(engine: Engine, prompt: list[int], args: argparse.Namespace, index: int) -> float:
    """Decode one sample of every row, print it and its figures; returns decoded tokens a second, all rows."""
    for row in range(args.batch_size):
        engine.add(f"row-{row}", prompt, sampling(args, sample=index, row=row))
    if args.batch_size == 1:
        print(args.prompt, end="", flush=True)
    texts = [args.prompt] * args.batch_size
    started = time.perf_counter()
    first = count = 0
    while not engine.idle:
        for event in engine.step():
            texts[int(event.request_id.removeprefix("row-"))] += event.text
            show(event, streamed=args.batch_size == 1)
            first = first or time.perf_counter()  # type: ignore[assignment]
            count += 1
    ended = time.perf_counter()
    for row, text in enumerate(texts if args.batch_size > 1 else []):
        print(f"\n--- row {row}\n{text}")
    rate = (count - args.batch_size) / (ended - first) if count > args.batch_size else count / (ended - started)
    told = engine.description
    read = told.weight_bytes_per_step if args.temperature else told.greedy_bytes_per_step
    bandwidth = read * rate / args.batch_size
    print(
        f"\nTime for inference {index + 1}: {ended - started:.2f} sec total, {rate:.2f} tokens/sec, "
        f"TTFT {(first - started) * 1000:.1f} ms"
    )
    print(f"Bandwidth achieved: {bandwidth / 1e9:.2f} GB/s")
    return rate


def acceptance(totals: Totals) -> str:
    """gpt-fast's two lines: shares of the blocks of which 0, 1, ... proposals stood, and how many did on average."""
    shares = [round(count / max(totals.steps, 1), 4) for count in totals.blocks]
    return f"Acceptance probs: {shares}\nMean Accepted: {totals.accepted / max(totals.steps, 1):.4f}"


def show(event: TextEvent, *, streamed: bool) -> None:
    if streamed:
        print(event.text, end="", flush=True)


def memory_used(device: torch.device) -> int:
    """Peak bytes: allocated on a GPU, else this process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# ------------------------------------------------------------------------------------------ chat


def chat(engine: Engine, args: argparse.Namespace) -> None:
    """A conversation on the terminal. Each turn prefills only what is new: the slot still holds the rest."""
    print("Type a message; /reset starts over, /exit or Ctrl-D leaves, Ctrl-C stops an answer.")
    messages: list[dict[str, str]] = []
    while True:
        try:
            line = input("\n> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line in ("/exit", "/quit"):
            return
        if line == "/reset":
            messages = []
        elif line:
            messages.append({"role": "user", "content": line})
            answer = say(engine, messages, sampling(args, sample=0, row=0))
            messages.append({"role": "assistant", "content": answer})


def say(engine: Engine, messages: list[dict[str, str]], params: SamplingParams) -> str:
    """Stream one answer to the terminal and return it; Ctrl-C ends it where it stands."""
    text = ""
    try:
        for event in engine.events(engine.encode_chat(messages), params):
            print(event.text, end="", flush=True)
            text += event.text
    except KeyboardInterrupt:
        print(" [stopped]", end="")
    print()
    return text


if __name__ == "__main__":
    main()
