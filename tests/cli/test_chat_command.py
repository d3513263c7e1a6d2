"""gpt-fast chat: history, commands, Ctrl-C, and what it says of a model that cannot chat."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from gpt_fast.chat import answer, converse, interrupts
from gpt_fast.config import ConfigError, SamplingParams
from gpt_fast.llm import Engine
from support.manifest import list_files
from support.quantized import random_model, small_config, write_checkpoint

TEMPLATE = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}a:"
PARAMS = SamplingParams(max_new_tokens=5, temperature=0.0, ignore_eos=True)
Captured = pytest.CaptureFixture[str]


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    made = write_checkpoint(tmp_path, random_model(small_config(vocab_size=257)), tokenizer=True)
    (made / "chat_template.jinja").write_text(TEMPLATE)
    list_files(made)
    return Engine.load(made, device="cpu", max_num_seqs=1, kernels="plain")


def type_lines(monkeypatch: pytest.MonkeyPatch, *lines: str | type[BaseException]) -> None:
    waiting = iter([*lines, EOFError])

    def typed(prompt: str) -> str:
        line = next(waiting)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", typed)


def prompts(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the model is given, from here on."""
    seen: list[str] = []
    encode = engine.encode_chat

    def noted(messages: list[dict[str, str]]) -> list[int]:
        seen.append("|".join(f"{m['role'][0]}:{m['content']}" for m in messages))
        return encode(messages)

    monkeypatch.setattr(engine, "encode_chat", noted)
    return seen


@pytest.mark.slow
def test_turns_follow_each_other_until_a_reset(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    seen = prompts(engine, monkeypatch)
    type_lines(monkeypatch, "ab", KeyboardInterrupt, "cd", "/help", "/reset", "ef", "/exit")
    converse(engine, PARAMS, system="s")
    first, second, third = seen
    assert first == "s:s|u:ab" and third == "s:s|u:ef"
    assert second.startswith("s:s|u:ab|a:") and second.endswith("|u:cd")
    shown = capsys.readouterr().out
    assert "/help: no such command: /reset starts over" in shown and engine.idle


@pytest.mark.slow
def test_a_message_that_does_not_fit_is_not_kept(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    seen = prompts(engine, monkeypatch)
    type_lines(monkeypatch, "x" * 100, "ab")
    converse(engine, PARAMS)
    assert seen[1] == "u:ab" and capsys.readouterr().err.count("\n") == 1


@pytest.mark.slow
def test_ctrl_c_stops_the_answer_and_the_engine_goes_on(engine: Engine) -> None:
    long = SamplingParams(max_new_tokens=40, temperature=0.0, ignore_eos=True)
    asked = [{"role": "user", "content": "ab"}]
    with interrupts() as seen:
        events = [
            signal.raise_signal(signal.SIGINT) if i == 2 else None
            for i, _ in enumerate(answer(engine, asked, long, seen))
        ]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert len(events) < 10 and engine.idle and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    engine.check_integrity()
    assert len([*answer(engine, asked, PARAMS, [])]) == 5


@pytest.mark.slow
def test_a_model_without_a_chat_template_is_refused_in_a_line(tmp_path: Path) -> None:
    made = write_checkpoint(tmp_path, random_model(small_config(vocab_size=257)), tokenizer=True)
    with pytest.raises(ConfigError, match=r"checkpoint_path: has no chat template: .* gpt-fast generate --prompt"):
        converse(Engine.load(made, device="cpu", kernels="plain"), PARAMS)
