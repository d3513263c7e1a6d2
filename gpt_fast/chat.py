"""gpt-fast chat: a conversation on the terminal, by the model's own chat template.

gpt-fast chat --checkpoint_path DIR
gpt-fast chat --checkpoint_path ORG/NAME:int8 --system "Answer in one sentence." --temperature 0
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from gpt_fast.cli.errors import at_least, one_line_errors, text
from gpt_fast.cli.parser import CommandParser
from gpt_fast.cli.quiet_gc import at_rest
from gpt_fast.config import ConfigError, EngineConfig, SamplingParams

with at_rest():
    from gpt_fast.convert.named import CHECKPOINT_HELP, checkpoint_to_serve
    from gpt_fast.llm import Engine, TextEvent
    from gpt_fast.load.engine import load_parts

HELP = "/reset starts over, /exit or Ctrl-D leaves, Ctrl-C stops an answer."
Message = dict[str, str]


def parser() -> CommandParser:
    flags = CommandParser(prog="gpt-fast chat", description=__doc__)
    add = flags.add_argument
    add("--checkpoint_path", required=True, help=CHECKPOINT_HELP)
    add("--system", default="", help="what the model is told before the conversation")
    add("--max_new_tokens", type=at_least(1), default=1024, help="of an answer")
    add("--temperature", type=float, default=0.8, help="0 is greedy")
    add("--top_k", type=int, default=200, help="draw from so many of the likeliest tokens; 0: from all")
    add("--top_p", type=float, default=1.0, help="draw from the likeliest tokens of this share together")
    add("--seed", type=int, help="of the draws; unless said, another one for each answer")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N, mps")
    add("--dtype", default="auto", help="auto (the checkpoint's), float32, bfloat16, float16")
    add("--kv_cache", default="auto", help="auto, float32, bfloat16, float16, int8")
    add("--max_seq_len", type=int, default=0, help="tokens of a conversation; 0: the model's own, at most 8192")
    return flags


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    with one_line_errors("chat"):
        params = SamplingParams(
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            seed=args.seed,
        )
        config = EngineConfig(
            checkpoint_path=str(checkpoint_to_serve(args.checkpoint_path, kv_cache=args.kv_cache, dtype=args.dtype)),
            device=args.device,
            dtype=args.dtype,
            kv_cache=args.kv_cache,
            max_seq_len=args.max_seq_len,
            max_num_seqs=1,
        )
        converse(Engine(load_parts(config)), params, system=args.system)


def converse(engine: Engine, params: SamplingParams, *, system: str = "") -> None:
    """Until the terminal ends or says so. Each turn prefills only what is new: the slot still holds the rest.

    ConfigError for a checkpoint without a chat template. A message that cannot be answered is not kept.
    """
    if engine.chat_template is None:
        way_out = "give a model that was trained to chat, or continue a text with gpt-fast generate --prompt"
        raise ConfigError("checkpoint_path", f"has no chat template: {way_out}", got=engine.description.checkpoint)
    with suppress(ImportError):
        import readline  # noqa: F401  (input() then has a history and can be edited)
    print(f"Type a message; {HELP}")
    start: list[Message] = [{"role": "system", "content": system}] if system else []
    messages = list(start)
    while (line := read_line()) is not None:
        if line == "/reset":
            messages = list(start)
        elif line.startswith("/"):
            print(f"{line.split()[0]}: no such command: {HELP}")
        elif line:
            asked = [*messages, {"role": "user", "content": line}]
            try:
                answer = say(engine, asked, params)
            except ValueError as error:  # it does not fit, or the template refuses it
                print(f"chat: {text(error)}; /reset starts over", file=sys.stderr)
            else:
                messages = [*asked, {"role": "assistant", "content": answer}]


def read_line() -> str | None:
    """What was typed; None to leave."""
    try:
        line = input("\n> ").strip()
    except EOFError:
        print()
        return None
    except KeyboardInterrupt:
        print(f"\n{HELP}", end="")
        return ""
    return None if line in ("/exit", "/quit") else line


def say(engine: Engine, messages: list[Message], params: SamplingParams) -> str:
    """Stream one answer to the terminal and return it; Ctrl-C ends it where it stands."""
    said = ""
    with interrupts() as seen:
        for event in answer(engine, messages, params, seen):
            print(event.text, end="", flush=True)
            said += event.text
    print(" [stopped]" if seen else "")
    return said


def answer(engine: Engine, messages: list[Message], params: SamplingParams, stop: list[int]) -> Iterator[TextEvent]:
    """Its events as they come, until it ends or there is something in `stop`, which each step looks at."""
    engine.add("chat", engine.encode_chat(messages), params)
    while not engine.idle:
        yield from engine.step()
        if stop:
            engine.abort("chat")


@contextmanager
def interrupts() -> Iterator[list[int]]:
    """Ctrl-C is noted in the list, so that no step of the engine is cut in two; a second one, in a step that hangs,
    ends the program as ever."""
    seen: list[int] = []

    def note(number: int, frame: object) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)


if __name__ == "__main__":
    main()
