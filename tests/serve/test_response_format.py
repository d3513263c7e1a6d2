"""response_format by HTTP, with OpenAI's own client, over a tiny random model: whole, streamed, refused."""

import json
import re

import openai
import pytest

from gpt_fast.config import SamplingParams
from support.round_server import RoundServer
from support.schemas import POINT, SLOW
from support.tiny_engine import tiny_engine


@pytest.fixture(scope="module")
def client():
    with RoundServer(tiny_engine(slots=4, max_seq_len=512)) as server:
        yield openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300)


def json_schema(schema):
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


USER = [{"role": "user", "content": "Where?"}]
FORMAT = json_schema(json.loads(POINT))


def test_a_chat_answers_in_json_whole_and_streamed(client):
    ask = {"model": "gpt-fast", "messages": USER, "response_format": FORMAT, "seed": 4, "max_tokens": 200}
    (choice,) = client.chat.completions.create(**ask).choices
    assert choice.finish_reason == "stop"
    assert set(json.loads(choice.message.content)) == {"x", "unit"}
    events = list(client.chat.completions.create(**ask, stream=True))
    assert "".join(event.choices[0].delta.content or "" for event in events) == choice.message.content
    assert events[-1].choices[0].finish_reason == "stop"


def test_every_choice_of_every_prompt_has_a_guide_of_its_own(client):
    answer = client.completions.create(
        model="gpt-fast",
        prompt=["a", "b"],
        n=2,
        seed=1,
        temperature=2.0,
        max_tokens=200,
        logprobs=2,
        extra_body={"response_format": FORMAT},
    )
    assert {choice.finish_reason for choice in answer.choices} == {"stop"}
    assert all(json.loads(choice.text)["unit"] in ("mm", "in") for choice in answer.choices)
    assert len({choice.text for choice in answer.choices}) > 1


def test_the_native_body_has_it_too(client):
    body = {"prompt": "x", "max_new_tokens": 200, "response_format": FORMAT, "stream": False}
    answer = client.post(str(client.base_url).removesuffix("/v1/"), body=body, cast_to=str)
    assert set(json.loads(answer)) == {"x", "unit"}


@pytest.mark.slow
def test_json_object_and_text(client):
    ask = {"model": "gpt-fast", "messages": USER, "seed": 0, "max_tokens": 300}
    (choice,) = client.chat.completions.create(**ask, response_format={"type": "json_object"}).choices
    assert choice.message.content.startswith("{")
    assert choice.finish_reason == "length" or isinstance(json.loads(choice.message.content), dict)
    plain = client.chat.completions.create(**ask, response_format={"type": "text"}).choices[0].message.content
    assert plain == client.chat.completions.create(**ask).choices[0].message.content


@pytest.mark.slow
@pytest.mark.parametrize(
    ("response_format", "says"),
    [
        (json_schema({"type": "robot"}), "robot"),
        (json_schema({"uniqueItems": True, "type": "array"}), "uniqueItems"),
        (json_schema({"enum": ["x" * 40_000]}), "(allowed 32768)"),
        (json_schema(json.loads(SLOW)), "(allowed 1 s and 1 GiB)"),
        ({"type": "yaml"}, "json_schema"),
    ],
)
def test_a_schema_that_cannot_be_met_is_a_400(client, response_format, says):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="gpt-fast", messages=USER, response_format=response_format)
    assert caught.value.param.startswith("response_format") and says in caught.value.message


def test_min_tokens_does_not_go_with_it(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="gpt-fast", prompt="x", extra_body={"min_tokens": 2, "response_format": FORMAT})
    assert caught.value.param == "min_tokens"


def test_stop_token_ids_end_an_answer_before_their_text():
    engine = tiny_engine(slots=2, max_seq_len=128)
    greedy = {"max_new_tokens": 30, "ignore_eos": True}
    (whole,) = engine.generate(["x"], [SamplingParams(**greedy)])
    stop = whole.tokens[9]
    end = whole.tokens.index(stop)
    cut, later = engine.generate(
        ["x"] * 2,
        [
            SamplingParams(**greedy, stop_token_ids=(stop,)),
            SamplingParams(**greedy, stop_token_ids=(stop,), min_tokens=end + 1),
        ],
    )
    assert cut.finish_reason == "stop" and cut.tokens == whole.tokens[: end + 1]
    assert cut.text == engine.tokenizer.decode(cut.tokens[:-1])
    assert later.tokens[:end] == whole.tokens[:end] and later.tokens[end] != stop
    with pytest.raises(ValueError, match="stop_token_ids"):
        engine.generate(["x"], [SamplingParams(stop_token_ids=(257,))])


def test_stop_token_ids_by_http(client):
    ask = {"model": "gpt-fast", "prompt": "x", "temperature": 0, "max_tokens": 40}
    (choice,) = client.completions.create(**ask, extra_body={"stop_token_ids": list(range(60))}).choices
    assert all(byte >= 60 for byte in choice.text.encode())
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**ask, extra_body={"stop_token_ids": [257]})
    assert caught.value.param == "stop_token_ids"


@pytest.mark.slow
def test_an_answer_is_what_vllm_and_llama_server_clients_ask_for(client):
    """Every field at both endpoints, streamed and not; what ends by itself matches."""
    cases = [
        ({"structured_outputs": {"regex": r"\d{2}-[a-f]+!"}}, lambda text: re.fullmatch(r"\d{2}-[a-f]+!", text)),
        ({"structured_outputs": {"choice": ["red", "green"]}}, lambda text: text in ("red", "green")),
        ({"grammar": 'root ::= "<" [0-9] root? ">"'}, lambda text: re.fullmatch(r"(<\d)+>+", text)),
        ({"structured_outputs": {"grammar": 'start: "a" "b"~2'}}, lambda text: text == "abb"),
        ({"json_schema": json.loads(POINT)}, lambda text: set(json.loads(text)) == {"x", "unit"}),
        ({"guided_choice": ["x"]}, lambda text: text == "x"),
    ]
    ask = {"model": "gpt-fast", "seed": 4, "max_tokens": 100}
    for extra, matches in cases:
        (choice,) = client.chat.completions.create(**ask, messages=USER, extra_body=extra).choices
        assert choice.finish_reason == "length" or matches(choice.message.content), (extra, choice.message.content)
        streamed = client.completions.create(**ask, prompt="x", stream=True, extra_body=extra)
        parts = [event.choices[0] for event in streamed]
        assert parts[-1].finish_reason == "length" or matches("".join(part.text for part in parts))


def test_a_constraint_that_cannot_be_had_is_named(client):
    for extra, param in (
        ({"structured_outputs": {"regex": "(?=a)"}}, "structured_outputs"),
        ({"grammar": "root ::= foo"}, "grammar"),
        ({"guided_regex": "("}, "guided_regex"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model="gpt-fast", prompt="x", extra_body=extra)
        assert caught.value.param == param and caught.value.message
