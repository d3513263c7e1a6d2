"""Guides: every finished answer of a random model matches its schema, and nobody else notices."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_tokenizer import MAKERS, NAMES

from gpt_fast.config import SamplingParams
from gpt_fast.text.chat import HERMES, LLAMA
from gpt_fast.text.grammar import MAX_GRAMMAR, Guide, GuideError, Maker, Vocabulary
from gpt_fast.text.grammar_check import Checked
from support.examples import examples
from support.schemas import POINT, SLOW, json_guide
from support.tiny_engine import EOS, ByteTokenizer, tiny_engine


@pytest.fixture(scope="module")
def engine():
    return tiny_engine(slots=4, max_seq_len=256)


@pytest.fixture(scope="module")
def maker():
    return Maker(ByteTokenizer(), vocab_size=257, eos_ids={EOS})


def trusted(maker, schema):
    """A guide without the check in a process of its own: of a schema that is known to be harmless."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gpt_fast.text.grammar.check", lambda grammar: Checked("", grammar))
        return json_guide(maker, json.dumps(schema))


# --------------------------------------------------------------- schemas, and whether a value matches one

names = st.sampled_from(["a", "b", "tag", "ä", 'q"\\'])
scalars = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.integers(-50, 50).map(lambda low: {"type": "integer", "minimum": low, "maximum": low + 60}),
    st.integers(0, 4).map(lambda most: {"type": "string", "maxLength": most}),
    st.lists(st.one_of(names, st.integers(-9, 9), st.none()), min_size=1, max_size=3, unique_by=repr).map(
        lambda values: {"enum": values}
    ),
)


@st.composite
def objects(draw, children):
    properties = draw(st.dictionaries(names, children, max_size=3))
    required = [name for name in properties if draw(st.booleans())]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def containers(children):
    arrays = st.builds(
        lambda items, most: {"type": "array", "items": items, "maxItems": most}, children, st.integers(0, 3)
    )
    return st.one_of(arrays, objects(children))


schemas = st.recursive(scalars, containers, max_leaves=5)


def matches(value, schema):
    """JSON Schema's meaning, for what `schemas` draws."""
    if "enum" in schema:
        return any(type(value) is type(each) and value == each for each in schema["enum"])
    kind = schema["type"]
    if kind in ("boolean", "null"):
        return isinstance(value, bool) if kind == "boolean" else value is None
    if kind == "integer":
        return type(value) is int and schema["minimum"] <= value <= schema["maximum"]
    if kind == "string":
        return isinstance(value, str) and len(value) <= schema["maxLength"]
    if kind == "array":
        within = isinstance(value, list) and len(value) <= schema["maxItems"]
        return within and all(matches(each, schema["items"]) for each in value)
    within = isinstance(value, dict) and set(schema["required"]) <= set(value) <= set(schema["properties"])
    return within and all(matches(each, schema["properties"][name]) for name, each in value.items())


def test_matches_can_say_no():
    schema = {"type": "object", "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 3}}, "required": ["a"]}
    assert matches({"a": 3}, schema)
    for wrong in ({}, {"a": 4}, {"a": True}, {"a": 1, "b": 2}, [], None):
        assert not matches(wrong, schema)


@pytest.mark.slow
@examples(40)
@given(drawn=st.lists(st.tuples(schemas, st.integers(0, 99), st.sampled_from([0.0, 1.0, 5.0])), min_size=1, max_size=4))
def test_every_finished_answer_matches_its_schema(engine, maker, drawn):
    """Several in one batch, each with its own schema."""
    params = [
        SamplingParams(max_new_tokens=120, seed=seed, temperature=heat, guide=trusted(maker, schema))
        for schema, seed, heat in drawn
    ]
    for (schema, *_), answer in zip(drawn, engine.generate(["say"] * len(drawn), params), strict=True):
        if answer.finish_reason == "stop":
            assert matches(json.loads(answer.text), schema), (answer.text, schema)
        else:
            assert answer.finish_reason == "length" and len(answer.tokens) == 120


def test_length_and_stop_are_told_apart(engine, maker):
    cut, whole = engine.generate(
        ["say"] * 2, [SamplingParams(max_new_tokens=most, guide=json_guide(maker, POINT)) for most in (5, 200)]
    )
    assert (cut.finish_reason, whole.finish_reason) == ("length", "stop")
    assert whole.text.startswith(cut.text) and set(json.loads(whole.text)) == {"x", "unit"}
    with pytest.raises(ValueError):
        json.loads(cut.text)


def test_eos_waits_for_the_end_of_the_grammar(maker):
    guide = json_guide(maker, POINT)
    output = []
    for byte in b'{"x":5,"unit":"mm"}':
        allowed = guide.allowed(output)
        assert len(allowed) == 257 and allowed[byte] and not allowed[EOS]
        output.append(byte)
    assert [token for token, may in enumerate(guide.allowed(output)) if may] == [EOS]


@pytest.mark.slow
def test_ignore_eos_goes_on_after_the_end_with_nothing(engine, maker):
    params = SamplingParams(max_new_tokens=80, ignore_eos=True, guide=json_guide(maker, '{"enum": ["ab"]}'))
    (answer,) = engine.generate(["say"], [params])
    assert (answer.text, answer.finish_reason, len(answer.tokens)) == ('"ab"', "length", 80)


@pytest.mark.slow
def test_a_neighbour_without_a_guide_is_unaffected(engine, maker):
    plain = [SamplingParams(max_new_tokens=60, seed=n, temperature=float(n)) for n in range(2)]
    alone = engine.generate(["neighbour one", "two"], plain)
    guided = SamplingParams(max_new_tokens=60, seed=3, temperature=1.0, guide=json_guide(maker, POINT))
    again = SamplingParams(max_new_tokens=60, seed=3, temperature=1.0, guide=json_guide(maker, POINT))
    one, first, second, two = engine.generate(["neighbour one", "x", "x", "two"], [plain[0], guided, again, plain[1]])
    assert [one, two] == alone and first == second
    assert engine.generate(
        ["x"], [SamplingParams(max_new_tokens=60, seed=3, temperature=1.0, guide=json_guide(maker, POINT))]
    ) == [first]


@pytest.mark.slow
def test_an_aborted_guided_request_leaves_no_trace(engine, maker):
    engine.add("gone", engine.encode("x"), SamplingParams(max_new_tokens=60, guide=json_guide(maker, POINT)))
    for _ in range(5):
        engine.step()
    engine.abort("gone")
    assert engine.idle
    (answer,) = engine.generate(["x"], [SamplingParams(max_new_tokens=200, guide=json_guide(maker, POINT))])
    assert answer.finish_reason == "stop" and json.loads(answer.text)


def test_a_grammar_that_breaks_down_allows_nothing(engine):
    """The request then ends with an error, and is not taken for finished."""

    class Broken:
        def is_error(self):
            return True

        def is_stopped(self):
            return True

    guide = Guide(Broken(), 257)
    assert not any(guide.allowed([1, 2]))
    (answer,) = engine.generate(["x"], [SamplingParams(max_new_tokens=9, guide=Guide(Broken(), 257))])
    assert (answer.finish_reason, answer.text) == ("error", "")


# --------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "robot"}, "robot"),
        ({"type": "object", "properties": 5}, "properties"),
        ({"not": {"type": "string"}}, "not"),
        ({"$ref": "http://example.com/x.json"}, "example.com"),
        ({"type": "string", "pattern": "("}, "regex"),
        ({"enum": ["x" * MAX_GRAMMAR]}, f"allowed {MAX_GRAMMAR}"),
        ([], "object"),
    ],
)
def test_a_bad_schema_is_refused_in_one_line(maker, schema, reason):
    with pytest.raises(GuideError, match=re.escape(reason)) as caught:
        json_guide(maker, json.dumps(schema))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_slow_schema_is_stopped(maker):
    """In a process of its own: nothing in this one could stop the compiler."""
    with pytest.raises(GuideError, match=r"too large to compile \(allowed 1 s and 1 GiB\)"):
        json_guide(maker, SLOW)
    assert json_guide(maker, POINT).allowed([])[ord("{")]


def test_a_schema_is_compiled_once(maker, monkeypatch):
    json_guide(maker, POINT)
    monkeypatch.setattr("gpt_fast.text.grammar.check", lambda *_, **__: pytest.fail("compiled again"))
    first, second = json_guide(maker, POINT), json_guide(maker, POINT)
    first.allowed(list(b'{"x":5'))
    assert second.allowed([]) == json_guide(maker, POINT).allowed([])  # they share nothing that moves


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("gpt_fast.text.grammar.available", lambda: False)
    with pytest.raises(GuideError, match=re.escape("pip install 'llguidance>=1.3'")):
        json_guide(Maker(ByteTokenizer(), vocab_size=257, eos_ids={EOS}), POINT)


def test_without_an_end_of_sequence_nothing_is_guided():
    with pytest.raises(GuideError, match="end-of-sequence"):
        json_guide(Maker(ByteTokenizer(), vocab_size=257, eos_ids=()), POINT)


# --------------------------------------------------------------------------------- tokenizers

TEXT = '{"x": -7, "unit": "in"}'


def check_follows(tokenizer, eos_ids, *, extra=0):
    """The guide accepts our own tokens of a matching text, and refuses those of another."""
    vocab_size, eos = tokenizer.vocab_size + extra, min(eos_ids)
    maker = Maker(tokenizer, vocab_size=vocab_size, eos_ids=eos_ids)
    guide, output, text = json_guide(maker, POINT), [], b""
    for token in greedy(tokenizer, TEXT.encode()):
        allowed = guide.allowed(output)
        assert len(allowed) == vocab_size and allowed[token] and not allowed[eos]
        assert not any(allowed[tokenizer.vocab_size :])
        output.append(token)
        text += tokenizer.token_bytes(token)
    assert guide.allowed(output)[eos] and text.decode() == TEXT
    wrong = greedy(tokenizer, b"Hello")[0]
    assert not json_guide(maker, POINT).allowed([])[wrong]


def greedy(tokenizer, text):
    """Tokens whose bytes join to the text, the longest first."""
    by_bytes = {tokenizer.token_bytes(token): token for token in range(tokenizer.vocab_size)}
    tokens = []
    while text:
        size = next(size for size in range(len(text), 0, -1) if text[:size] in by_bytes)
        tokens.append(by_bytes[text[:size]])
        text = text[size:]
    return tokens


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_kind_of_tokenizer(name, tmp_path):
    """tokenizer.json, SentencePiece, a GGUF's own and tiktoken; logits may be padded past the vocabulary."""
    tokenizer = MAKERS[name](tmp_path).ours
    eos_ids = tokenizer.eos_ids or {0}  # config.json may know what the tokenizer's files do not
    check_follows(tokenizer, eos_ids)
    check_follows(tokenizer, eos_ids, extra=64)


@pytest.mark.parametrize("name", NAMES)
def test_texts_are_encoded_byte_for_byte(name, tmp_path):
    tokenizer = MAKERS[name](tmp_path).ours
    vocabulary = Vocabulary(tokenizer, tokenizer.vocab_size, [0])
    for text in ("", "{", ' "a": [', "\n  ", "Zürich\u0301 天気 ﬁ ½", "</s><|im_end|>", "\x7f\u2028"):
        assert b"".join(tokenizer.token_bytes(token) for token in vocabulary(text)) == text.encode()


# --------------------------------------------------------------------------------- calls of tools

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "move",
            "parameters": {
                "type": "object",
                "properties": {"to": {"$ref": "#/$defs/Place"}},
                "required": ["to"],
                "additionalProperties": False,
                "$defs": {"Place": {"enum": ["here", "there"]}},
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "stop",
            "parameters": {
                "properties": {"now": {"type": "boolean"}},
                "required": ["now"],
                "additionalProperties": False,
            },
        },
    },
]


@pytest.mark.slow
@pytest.mark.parametrize("form", [HERMES, LLAMA])
def test_a_guided_answer_is_one_call(engine, maker, form):
    seen = set()
    for seed in range(8):
        params = SamplingParams(max_new_tokens=200, seed=seed, temperature=1.0, guide=maker.calls_guide(TOOLS, form))
        (answer,) = engine.generate(["x"], [params])
        if answer.finish_reason == "length":
            continue
        body = answer.text.removeprefix(form.before).removesuffix(form.after)
        call = json.loads(body)
        assert len(body) == len(answer.text) - len(form.before) - len(form.after)
        key = form.arguments_key
        assert set(call) == {"name", key}
        assert call[key]["to"] in ("here", "there") if call["name"] == "move" else type(call[key]["now"]) is bool
        seen.add(call["name"])
    assert seen <= {"move", "stop"} and seen
