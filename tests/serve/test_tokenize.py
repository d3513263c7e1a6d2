"""/tokenize, /detokenize and /tokenizer_info of the default model, over HTTP; transformers has the right tokens."""

from __future__ import annotations

import json
import urllib.error
import urllib.request

import pytest

from gpt_fast.llm import Engine
from support.round_server import RoundServer

pytestmark = pytest.mark.model
TEXT = "Fire \U0001f642 and <|im_start|>water"
CHAT = [{"role": "user", "content": "Say <|im_end|>."}]


@pytest.fixture(scope="module")
def ask(default_checkpoint):
    """ask(path, body): the answer as JSON, or the error's status and object."""
    engine = Engine.load(default_checkpoint / "model_int4.g32.safetensors", max_num_seqs=1, max_seq_len=512)
    with RoundServer(engine) as server:

        def post(path, body=None):
            data = None if body is None else json.dumps(body).encode()
            try:
                with urllib.request.urlopen(f"{server.url}/{path}", data=data, timeout=30) as reply:
                    return json.load(reply)
            except urllib.error.HTTPError as error:
                return error.code, json.load(error)["error"]

        yield post


@pytest.fixture(scope="module")
def reference(default_checkpoint):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(default_checkpoint)


def test_a_prompt(ask, reference):
    answer = ask("tokenize", {"model": "gpt-fast", "prompt": TEXT, "return_token_strs": True})
    ids = reference(TEXT)["input_ids"]
    strings = answer.pop("token_strs")
    assert answer == {"count": len(ids), "max_model_len": 512, "tokens": ids}
    assert "<|im_start|>" in strings and len(strings) == len(ids) and strings[0] == "Fire"
    assert ask("tokenize", {"prompt": "water", "add_special_tokens": False})["token_strs"] is None
    literal = ask("tokenize", {"prompt": TEXT, "parse_special": False})["tokens"]
    assert len(literal) > len(ids) and ask("detokenize", {"tokens": literal})["prompt"] == TEXT


@pytest.mark.parametrize("generation", [True, False])
def test_a_chat(ask, reference, generation):
    answer = ask("tokenize", {"messages": CHAT, "add_generation_prompt": generation})
    text = ask("detokenize", {"tokens": answer["tokens"]})["prompt"]
    assert text == reference.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=generation)
    assert answer["count"] == len(answer["tokens"])


def test_as_llama_server(ask, reference):
    assert ask("tokenize", {"content": TEXT}) == {"tokens": reference(TEXT, add_special_tokens=False)["input_ids"]}
    pieces = ask("tokenize", {"content": "a\U0001f642", "with_pieces": True})["tokens"]
    data = b"".join(bytes(p) if isinstance(p, list) else p.encode() for p in (each["piece"] for each in pieces))
    assert data.decode() == "a\U0001f642" and [each["id"] for each in pieces] == reference("a\U0001f642")["input_ids"]


def test_there_and_back(ask, reference):
    ids = reference(TEXT)["input_ids"]
    assert ask("detokenize", {"tokens": ids}) == {"prompt": reference.decode(ids), "content": reference.decode(ids)}
    assert ask("detokenize", {"tokens": []})["prompt"] == ""


def test_what_lm_eval_asks_for(ask, reference):
    info = ask("tokenizer_info")
    assert info["eos_token"] == reference.eos_token and info["bos_token"] == reference.bos_token
    assert ask("tokenize", {"prompt": info["eos_token"], "add_special_tokens": False})["tokens"] == [
        reference.eos_token_id
    ]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("tokenize", {}, "prompt"),
        ("tokenize", {"prompt": "a", "messages": CHAT}, "prompt"),
        ("tokenize", {"prompt": 7}, "prompt"),
        ("tokenize", {"prompt": "a", "add_special_tokens": 1}, "add_special_tokens"),
        ("tokenize", {"prompt": "a", "add_generation_prompt": True}, "add_generation_prompt"),
        ("tokenize", {"messages": []}, "messages"),
        ("tokenize", {"messages": CHAT, "add_special_tokens": True}, "add_special_tokens"),
        ("tokenize", {"prompt": "a", "model": "other"}, "model"),
        ("detokenize", {}, "tokens"),
        ("detokenize", {"tokens": [49152]}, "tokens"),
        ("detokenize", {"tokens": [-1]}, "tokens"),
        ("detokenize", {"tokens": [True]}, "tokens"),
        ("detokenize", {"tokens": "a"}, "tokens"),
        ("detokenize", {"tokens": [1], "prompt": "a"}, "prompt"),
    ],
)
def test_a_wrong_field_is_named(ask, path, body, param):
    status, error = ask(path, body)
    assert status == (404 if param == "model" else 400) and error["param"] == param
