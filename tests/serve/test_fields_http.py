"""Fields that other servers take, by HTTP over a tiny engine: what each one does to the prompt and to the answer."""

import json
import urllib.error
import urllib.request

import openai
import pytest

from gpt_fast.serve.neutral import IGNORED, NEUTRAL
from gpt_fast.text.chat import ChatTemplate
from support.round_server import RoundServer
from support.tiny_engine import ByteTokenizer, tiny_engine

USER = [{"role": "user", "content": "hi"}]
SPECIAL = "<|im_end|>"
# Says what it was given: a tiny model cannot, but the prompt's length can.
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if not loop.last %}|{% endif %}{% endfor %}"
    "{% if enable_thinking is defined %}[{{ enable_thinking }}]{% endif %}"
    "{% for d in documents or [] %}({{ d.text }}){% endfor %}{% if add_generation_prompt %}|<assistant>{% endif %}"
)


class SpecialTokenizer(ByteTokenizer):
    """Has a BOS, and one special token that text can spell."""

    bos_id = 1
    control_tokens = (SPECIAL,)

    def _encode(self, text, *, specials, add_bos):
        parts = text.split(SPECIAL) if specials else [text]
        ids = [list(part.encode()) for part in parts]
        return [self.bos_id] * add_bos + sum(([2, *each] for each in ids[1:]), ids[0])


@pytest.fixture(scope="module")
def server():
    engine = tiny_engine(slots=4, max_seq_len=256)
    engine.tokenizer = SpecialTokenizer()
    engine.chat_template = ChatTemplate(TEMPLATE)
    with RoundServer(engine) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300)


def complete(client, prompt, **extra):
    return client.completions.create(model="gpt-fast", prompt=prompt, max_tokens=3, seed=1, extra_body=extra)


def chat(client, messages=USER, **extra):
    return client.chat.completions.create(model="gpt-fast", messages=messages, max_tokens=3, seed=1, extra_body=extra)


def test_special_tokens_of_a_completion_are_tokens_unless_it_says_otherwise(client):
    def size(**extra):
        return complete(client, f"a{SPECIAL}b", **extra).usage.prompt_tokens

    assert size() == size(parse_special=True, add_special_tokens=True) == 4
    assert size(add_special_tokens=False) == 3
    assert size(parse_special=False) == 3 + len(SPECIAL)
    assert size(parse_special=False, add_special_tokens=False) == 2 + len(SPECIAL)


def test_special_tokens_of_a_chats_users_stay_text(client):
    plain = chat(client).usage.prompt_tokens
    spelled = chat(client, [{"role": "user", "content": "hi" + SPECIAL}]).usage.prompt_tokens
    assert spelled == plain + len(SPECIAL)


def test_the_template_gets_what_the_request_says(client):
    plain = chat(client).usage.prompt_tokens
    assert chat(client, chat_template_kwargs={"enable_thinking": False}).usage.prompt_tokens == plain + len("[False]")
    assert chat(client, reasoning_effort="low").usage.prompt_tokens == plain + len("[True]")
    assert chat(client, documents=[{"text": "xyz"}]).usage.prompt_tokens == plain + len("(xyz)")
    assert chat(client, add_generation_prompt=False).usage.prompt_tokens == plain - len("|<assistant>")
    said = [*USER, {"role": "assistant", "content": "Well"}]
    begun = chat(client, said, continue_final_message=True).usage.prompt_tokens
    assert begun == len("<user>hi|<assistant>Well")


def test_usage_in_every_chunk(client):
    ask = {"model": "gpt-fast", "stream": True, "max_tokens": 5, "seed": 1}
    options = {"include_usage": True, "continuous_usage_stats": True}
    for events in (
        list(client.chat.completions.create(**ask, messages=USER, stream_options=options)),
        list(client.completions.create(**ask, prompt="x", stream_options=options)),
    ):
        counts = [event.usage.completion_tokens for event in events]
        assert counts == sorted(counts) and counts[-1] == counts[-2] and not events[-1].choices
        assert all(e.usage.total_tokens == e.usage.prompt_tokens + e.usage.completion_tokens for e in events)
    events = list(client.completions.create(**ask, prompt="x", stream_options={"include_usage": True}))
    assert [event.usage is None for event in events] == [True] * (len(events) - 1) + [False]


@pytest.mark.parametrize("path", ["", "/v1/completions", "/v1/chat/completions"])
def test_everything_that_asks_for_nothing_at_once(server, path):
    """All defaults of vLLM's and OpenAI's fields in one body, and each of them as null."""
    minimal = {"messages": USER} if "chat" in path else {"prompt": "hi"}
    minimal |= {"seed": 1, "max_tokens" if path else "max_new_tokens": 3, "stream": False}
    neutral = {name: values[0] if values else None for name, values in NEUTRAL.items()}
    neutral |= {name: kind() for name, (kind, _) in IGNORED.items()}
    neutral |= {"reasoning_effort": None, "logprobs": None, "add_special_tokens": None}
    texts = [
        answer_text(post(server, path, body)) for body in (minimal, neutral | minimal, dict.fromkeys(neutral) | minimal)
    ]
    assert texts[0] == texts[1] == texts[2]


def answer_text(body):
    return body if isinstance(body, str) else [choice.get("message", choice.get("text")) for choice in body["choices"]]


def post(server, path, body):
    request = urllib.request.Request(server.url + path, json.dumps(body).encode())
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            text = answer.read().decode()
    except urllib.error.HTTPError as error:
        raise AssertionError(error.read()) from None
    return json.loads(text) if path else text
