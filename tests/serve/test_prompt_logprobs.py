"""Echo with logprobs, prompt_logprobs, max_tokens 0, through OpenAI's client; right is what a plain forward says."""

from __future__ import annotations

import json

import openai
import pytest
import torch

from gpt_fast.model.cache import KVCache
from gpt_fast.model.forward import Batch
from gpt_fast.serve.admission import Admit, Limits
from gpt_fast.serve.prompt_logprobs import MAX_ENTRIES, check_entries, text_offsets
from gpt_fast.serve.request import RequestError
from gpt_fast.text.load_tokenizer import load_tokenizer
from support.round_server import RoundServer
from support.tiny_engine import EOS, ByteTokenizer, tiny_engine
from support.tiny_tokenizers import bytes_json, special

LIMITS = Limits(max_new_tokens=20, stream=True, max_waiting=4, max_seconds=60.0)
PROMPT = "One fish, two fish. \U0001f642"


@pytest.fixture(scope="module")
def engine():
    return tiny_engine(slots=4)


@pytest.fixture(scope="module")
def client(engine):
    with RoundServer(engine) as server:
        yield openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=30)


@pytest.fixture(scope="module")
def expected(engine):
    """expected(ids): [S, V], what each position says of the next token."""

    def logprobs(ids):
        cache = KVCache(engine.model_config, slots=1, max_seq_len=128, dtype=torch.float32, device=torch.device("cpu"))
        batch = Batch(torch.tensor([ids]), torch.arange(len(ids))[None], cache, length=128)
        with torch.inference_mode():
            return engine.core.runner.prefill(batch)[0].log_softmax(-1)

    return logprobs


def names(ids):
    return [chr(i) if i < 128 else f"bytes:\\x{i:02x}" for i in ids]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", [PROMPT, list(PROMPT.encode())], ids=["text", "ids"])
def test_an_echo_tells_of_the_prompt_and_of_the_answer(client, expected, prompt, stream):
    ids = list(PROMPT.encode())
    answer = client.completions.create(
        model="gpt-fast", prompt=prompt, echo=True, logprobs=3, max_tokens=5, temperature=0, stream=stream,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    parts = [part.choices[0] for part in answer] if stream else answer.choices
    told = {
        name: [value for part in parts for value in getattr(part.logprobs, name)]
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    }
    assert "".join(part.text for part in parts).startswith(PROMPT)
    assert told["tokens"][: len(ids)] == names(ids) and len(told["tokens"]) == len(ids) + 5
    assert told["token_logprobs"][0] is None and told["top_logprobs"][0] is None
    rows = expected(ids)
    right = [rows[i, token].item() for i, token in enumerate(ids[1:])]
    assert told["token_logprobs"][1 : len(ids)] == pytest.approx(right, abs=1e-4)
    for i, best in enumerate(told["top_logprobs"][1 : len(ids)]):
        likely = {names([token])[0]: rows[i, token].item() for token in [ids[i + 1], *rows[i].topk(3).indices.tolist()]}
        assert best == pytest.approx(likely, abs=1e-4)
    smile = PROMPT.index("\U0001f642")
    assert told["text_offset"][: len(ids)] == [*range(smile), *[smile] * 4]
    assert told["text_offset"][len(ids)] == len(PROMPT)


def test_prompt_logprobs_as_vllm_lists_them(client, expected):
    ids = list(PROMPT.encode())
    answer = client.completions.create(
        model="gpt-fast", prompt=[PROMPT, "x"], max_tokens=1, logprobs=1, n=2, extra_body={"prompt_logprobs": 2}
    )
    assert len(answer.choices) == 4 and [choice.prompt_logprobs for choice in answer.choices[2:]] == [[None]] * 2
    for choice in answer.choices[:2]:
        first, *listed = choice.prompt_logprobs
        assert first is None and len(choice.logprobs.tokens) <= 1
        for token, row, entries in zip(ids[1:], expected(ids), listed, strict=False):
            best = row.topk(2).indices.tolist()
            assert {int(each) for each in entries} == {token, *best}
            assert entries[str(token)]["logprob"] == pytest.approx(row[token].item(), abs=1e-4)
            assert [entries[str(each)]["rank"] for each in best] == [1, 2]
            assert entries[str(token)]["decoded_token"] == names([token])[0]


def test_prompt_logprobs_of_a_chat_stand_beside_the_choices(client, engine):
    messages = [{"role": "user", "content": "hello"}]
    answer = client.chat.completions.create(
        model="gpt-fast", messages=messages, max_tokens=2, extra_body={"prompt_logprobs": 0}
    )
    ids = engine.encode_chat(messages)
    assert answer.prompt_logprobs[0] is None
    assert [list(map(int, entries)) for entries in answer.prompt_logprobs[1:]] == [[token] for token in ids[1:]]


@pytest.mark.parametrize("stream", [False, True])
def test_no_tokens_are_no_tokens(client, stream):
    """max_tokens 0: the prompt is computed, its echo and its log-probabilities are the answer."""
    answer = client.completions.create(
        model="gpt-fast", prompt=PROMPT, echo=True, logprobs=1, max_tokens=0, stream=stream
    )
    (*_, part) = answer if stream else [answer]
    choice = part.choices[0]
    assert choice.text == PROMPT and choice.finish_reason == "length"
    assert choice.logprobs.tokens == names(PROMPT.encode())
    empty = client.completions.create(model="gpt-fast", prompt=PROMPT, max_tokens=0)
    assert empty.choices[0].text == "" and empty.usage.completion_tokens == 0 and empty.usage.prompt_tokens == 24


def test_a_reused_prompt_is_scored_all_the_same(client):
    def scores():
        return client.completions.create(model="gpt-fast", prompt="y" * 60, echo=True, logprobs=0, max_tokens=0)

    first = scores()
    client.completions.create(model="gpt-fast", prompt="y" * 60, max_tokens=1)
    assert scores().choices[0].logprobs == first.choices[0].logprobs


def test_an_answer_is_bounded():
    check_entries([[1] * 2047] * 16, 1, "logprobs")  # what lm-evaluation-harness sends at most, in batches of 16
    with pytest.raises(RequestError, match=f"prompt_logprobs: .*allowed {MAX_ENTRIES}"):
        check_entries([[1] * 8191], 20, "prompt_logprobs")


def test_offsets_are_those_of_the_text():
    text = "aé\U0001f642b"
    assert text_offsets(ByteTokenizer(), list(text.encode()), text) == [0, 1, 1, 2, 2, 2, 2, 3]


@pytest.mark.parametrize("text", ["<a>hi<b> you", "hi<b>", "<b>", "no specials"])
@pytest.mark.parametrize("bos", [None, "<a>"])
def test_special_tokens_that_are_spelled_in_a_text_have_their_place_in_it(tmp_path, text, bos):
    """As `tokenizers` decodes it; BOS, which the tokenizer puts before a text, has none."""
    import tokenizers

    (tmp_path / "tokenizer.json").write_text(json.dumps(bytes_json("llama3", special("<a>", "<b>"), bos=bos)))
    ours, reference = load_tokenizer(tmp_path), tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ids = ours.encode(text, specials=True)
    assert ids == reference.encode(text).ids
    before = len(bos or "")
    ends = [len(reference.decode(ids[:size], skip_special_tokens=False)) - before for size in range(len(ids))]
    assert text_offsets(ours, ids, text) == [max(end, 0) for end in ends]


def test_an_echo_of_token_ids_is_all_of_their_text(engine):
    """As vLLM tells it, special tokens too: each token has its place."""
    admit = Admit(engine, in_flight=lambda: 0, limits=LIMITS, model_names=["gpt-fast"], draining=lambda: False)
    assert admit.echo((*b"hi", EOS)) == "hi" + engine.tokenizer.token_bytes(EOS, keep_specials=True).decode()
