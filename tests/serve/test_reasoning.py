"""Reasoning apart from content: texts however they are cut, and by HTTP over a model that is made to think."""

import json

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt_fast.config import SamplingParams
from gpt_fast.serve.reasoning import Reasoning, ReasoningParser
from gpt_fast.serve.response import Said
from gpt_fast.serve.tool_calls import TextOnly, ToolCall, call_parser
from gpt_fast.text.chat import HERMES, ChatTemplate
from gpt_fast.text.grammar import Constraint, Maker
from support.examples import examples
from support.hard_strings import TRL, wheel_member
from support.round_server import RoundServer
from support.tiny_engine import EOS, ByteTokenizer, tiny_engine

USER = [{"role": "user", "content": "hi"}]
OPENS = "{% for m in messages %}{{ m.content }}{% endfor %}|<think>\n{# and the model writes </think> #}"


def read(chunks, *, begun=False, cut=False, content=TextOnly):
    parser = ReasoningParser(content(), begun=begun)
    pieces = [piece for chunk in chunks for piece in parser.push(chunk)]
    said = Said.of([*pieces, *parser.finish(cut=cut)])
    return said.reasoning, said.content, said.calls


@pytest.mark.parametrize(
    ("text", "begun", "reasoning", "content"),
    [
        ("<think>\nhm\n</think>\n\nYes", False, "hm", "Yes"),
        ("hm\n</think>\n\nYes\n", True, "hm", "Yes\n"),
        ("<think></think>Yes", False, "", "Yes"),
        ("<think>\n\n</think>\n\nYes", False, "", "Yes"),
        ("\n <think>a</think> b <think>c</think>", False, "a", "b <think>c</think>"),
        ("Yes <think>", False, "", "Yes <think>"),
        ("<thin", False, "", "<thin"),
        (" <thin ", False, "", " <thin "),
        ("<think>a </thi", False, "a </thi", ""),
        ("a  b </think ", True, "a  b </think", ""),
        ("", True, "", ""),
        ("", False, "", ""),
        ("a</think>", True, "a", ""),
    ],
)
def test_reasoning_and_content(text, begun, reasoning, content):
    assert read([text], begun=begun) == read(text, begun=begun) == (reasoning, content, [])


FRAGMENTS = st.sampled_from(["<think>", "</think>", "<th", "ink>", "</", "\n", " ", "a", "é", "<", "<tool_call>"])


@examples(200)
@given(text=st.lists(FRAGMENTS, max_size=10).map("".join), begun=st.booleans(), size=st.integers(1, 5))
def test_any_text_means_the_same_however_it_is_cut(text, begun, size):
    cuts = [text[at : at + size] for at in range(0, len(text), size)]
    assert read(cuts, begun=begun) == read([text], begun=begun)


def test_calls_come_behind_the_reasoning_and_never_within():
    call = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
    text = f"<think>maybe {call}?</think>\n{call}"
    found = read(text, content=lambda: call_parser(HERMES, ["clock"]))
    assert found == (f"maybe {call}?", "", [ToolCall("clock", "{}")])


class Scripted:
    """A guide that lets one text through: what a model says that thinks."""

    def __init__(self, text):
        self._tokens = [*text.encode(), EOS]

    def allowed(self, output):
        return bytes(int(token == self._tokens[min(len(output), len(self._tokens) - 1)]) for token in range(257))


@pytest.fixture(scope="module")
def thinker():
    """A server whose model answers every free chat with its reasoning and "Yes"."""
    engine = tiny_engine(slots=4, max_seq_len=512)
    engine.chat_template = ChatTemplate(wheel_member(TRL, "trl/chat_templates/qwen3.jinja").decode())
    add = engine.add

    def scripted(name, prompt, params, **options):
        text = "<think>\nhm, é\n</think>\n\nYes"
        text = text.removeprefix("<think>\n") if bytes(prompt).endswith(b"<think>\n") else text
        text = "Yes" if bytes(prompt).endswith(b"</think>\n\n") else text
        fields = {name: getattr(params, name) for name in ("max_new_tokens", "logprobs")}
        guide = params.guide or Scripted(text)
        return add(name, prompt, SamplingParams(**fields, guide=guide), **options)

    engine.add = scripted
    with RoundServer(engine) as server:
        yield engine, openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300)


def ask(thinker, **fields):
    asked = {"messages": USER, "max_tokens": 200, "stream": fields.pop("stream", False)}
    return thinker[1].chat.completions.create(model="gpt-fast", **asked, extra_body=fields)


def test_an_answers_reasoning_has_its_own_field(thinker):
    (choice,) = ask(thinker).choices
    assert (choice.message.reasoning_content, choice.message.content) == ("hm, é", "Yes")
    assert choice.message.reasoning == choice.message.reasoning_content  # vLLM's name
    events = list(ask(thinker, stream=True))
    deltas = [event.choices[0].delta for event in events]
    assert "".join(getattr(delta, "reasoning_content", "") or "" for delta in deltas) == "hm, é"
    assert "".join(delta.content or "" for delta in deltas) == "Yes"
    thought = [hasattr(delta, "reasoning_content") for delta in deltas]
    assert sum(thought) > 1 and not any(thought[thought.index(False, thought.index(True)) :])
    (cut,) = ask(thinker, max_tokens=12).choices
    assert cut.finish_reason == "length" and cut.message.content is None and "hm".startswith(cut.message.reasoning[:2])


def test_reasoning_that_is_not_asked_for(thinker):
    (choice,) = ask(thinker, include_reasoning=False).choices
    assert choice.message.content == "Yes" and not hasattr(choice.message, "reasoning_content")
    (choice,) = ask(thinker, chat_template_kwargs={"enable_thinking": False}).choices
    assert choice.message.content == "Yes" and not hasattr(choice.message, "reasoning_content")
    streamed = ask(thinker, include_reasoning=False, stream=True)
    assert not any(hasattr(event.choices[0].delta, "reasoning_content") for event in streamed)


def test_an_answer_that_goes_on_with_reasoning(thinker):
    begun = [*USER, {"role": "assistant", "content": "<think>\nhm"}]
    (choice,) = ask(thinker, messages=begun, continue_final_message=True).choices
    assert choice.message.reasoning_content and "<think>" in choice.message.reasoning_content


def test_logprobs_come_with_the_reasoning_too(thinker):
    (choice,) = ask(thinker, logprobs=True).choices
    rows = [event.choices[0].logprobs for event in ask(thinker, logprobs=True, stream=True)]
    streamed = [row.token for each in rows if each for row in each.content]
    assert streamed == [row.token for row in choice.logprobs.content]


@pytest.mark.slow
def test_a_constrained_answer_of_a_model_that_has_begun_to_think():
    """It thinks to the end, and what follows matches."""
    engine = tiny_engine(slots=4, max_seq_len=256)
    engine.chat_template = ChatTemplate(OPENS)
    schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"enum": ["red", "blue"]}}}
    maker = Maker(ByteTokenizer(), vocab_size=257, eos_ids={EOS})
    guide, text = maker.guide(Constraint("choice", '["red"]'), thinking=True), b"hm < 3\n</think>\n\nred"
    output = [*text, EOS]
    assert all(guide.allowed(output[:at])[token] for at, token in enumerate(output))
    with RoundServer(engine) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300)
        ask = {"model": "gpt-fast", "messages": USER, "response_format": schema, "max_tokens": 60, "seed": 1}
        # A random model never ends its reasoning by itself: its logits are made to like each letter of the mark.
        bias = {str(byte): 40 for byte in b"</think>"}
        (choice,) = client.chat.completions.create(**ask, logit_bias=bias).choices
    assert choice.message.reasoning_content
    if choice.finish_reason == "stop":
        assert json.loads(choice.message.content) in ("red", "blue")


def test_the_pieces_are_told_apart():
    assert Said.of([Reasoning("a"), "b", Reasoning("c"), ToolCall("d", "{}")]) == ("ac", "b", [ToolCall("d", "{}")])


@pytest.mark.slow
def test_reasoning_is_a_block_of_a_message(thinker):
    import anthropic  # 2.7 s: not for every collection of tests

    base_url = str(thinker[1].base_url).removesuffix("/v1/")
    client = anthropic.Anthropic(base_url=base_url, api_key="none", max_retries=0, timeout=300)
    asked = {"model": "gpt-fast", "messages": USER, "max_tokens": 200}
    whole = client.messages.create(**asked)
    with client.messages.stream(**asked) as stream:
        streamed = stream.get_final_message()
    for message in (whole, streamed):
        thought, said = message.content
        assert (thought.type, thought.thinking, said.type, said.text) == ("thinking", "hm, é", "text", "Yes")
    turns = [*USER, {"role": "assistant", "content": streamed.content}, *USER]
    assert client.messages.create(**asked | {"messages": turns}).usage.input_tokens > whole.usage.input_tokens
    quiet = client.messages.create(**asked, thinking={"type": "disabled"})
    assert [block.type for block in quiet.content] == ["text"]


@pytest.mark.slow
def test_reasoning_is_an_item_of_a_response(thinker):
    asked = {"model": "gpt-fast", "input": USER, "max_output_tokens": 200}
    whole = thinker[1].responses.create(**asked)
    with thinker[1].responses.stream(**asked) as stream:
        kinds = [event.type for event in stream]
        streamed = stream.get_final_response()
    assert "response.reasoning_text.delta" in kinds and "response.reasoning_text.done" in kinds
    for response in (whole, streamed):
        thought, said = response.output
        assert (thought.type, thought.content[0].text, said.content[0].text) == ("reasoning", "hm, é", "Yes")
    turns = [*USER, *streamed.output, *USER]
    assert thinker[1].responses.create(**asked | {"input": turns}).usage.input_tokens > whole.usage.input_tokens
