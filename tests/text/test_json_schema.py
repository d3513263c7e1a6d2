"""Whatever a guide lets through validates by jsonschema, numbers of any size included; or the schema is refused."""

import json
import random
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import jsonschema
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import (
    UUID1,
    UUID3,
    UUID4,
    UUID5,
    UUID7,
    Base64Bytes,
    Base64UrlBytes,
    BaseModel,
    Field,
    FilePath,
    SecretStr,
    TypeAdapter,
)

from gpt_fast.text.grammar import GuideError, Maker
from gpt_fast.text.grammar_check import Checked
from gpt_fast.text.json_schema import EXACT, SchemaError, exact_schema
from support.schemas import json_guide
from support.tiny_engine import EOS, ByteTokenizer

LARGE = 1234567890123456789


@pytest.fixture(scope="module")
def maker() -> Maker:
    return Maker(ByteTokenizer(), vocab_size=257, eos_ids={EOS})


def walk(maker: Maker, schema: Any, seed: int, *, limit: int = 300) -> str | None:
    """A finished answer of random allowed bytes, which ends as soon as it may; None where it grows too long."""
    with pytest.MonkeyPatch.context() as patch:  # of schemas that are known to be harmless
        patch.setattr("gpt_fast.text.grammar.check", lambda grammar: Checked("", grammar))
        guide = json_guide(maker, json.dumps(schema))
    choose, output = random.Random(seed), []
    while len(output) < limit:
        allowed = [token for token, may in enumerate(guide.allowed(output)) if may]
        assert allowed, (bytes(output), schema)
        if EOS in allowed and (len(allowed) == 1 or choose.random() < 0.3):
            return bytes(output).decode()
        output.append(choose.choice([token for token in allowed if token != EOS]))
    return None


def check(maker: Maker, schema: Any, *, walks: int = 6) -> list[str]:
    """Walk some answers; every finished one validates."""
    answers = [answer for seed in range(walks) if (answer := walk(maker, schema, seed)) is not None]
    for answer in answers:
        jsonschema.validate(json.loads(answer), schema, cls=jsonschema.Draft202012Validator)
    return answers


edges = [0, 1, 2**31, EXACT, 10**15, 10**16, 10**17, 10**18, LARGE, 2**63, 2**64, 10**30, 10**400]
integers = st.builds(
    lambda edge, offset, sign: sign * (edge + offset),
    st.sampled_from(edges),
    st.integers(-3, 3),
    st.sampled_from([1, -1]),
)
floats = st.floats(allow_nan=False, allow_infinity=False)
numbers = integers | floats | st.sampled_from([0.1, 0.3, 1e-7, 1e16, 1.1e20, 5e-324, -1e-300])
values = st.recursive(
    numbers | st.booleans() | st.none() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["a", "enum"]), inner, max_size=2),
    max_leaves=3,
)
bounds = st.dictionaries(
    st.sampled_from(["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"]), numbers, min_size=1, max_size=3
)
leaves = st.one_of(
    values.map(lambda value: {"const": value}),
    st.lists(values, min_size=1, max_size=3).map(lambda listed: {"enum": listed}),
    st.builds(lambda kind, limits: {"type": kind, **limits}, st.sampled_from(["integer", "number"]), bounds),
    st.sampled_from([3, 5.0, 0.1, 1.5, 7]).map(lambda step: {"type": "number", "multipleOf": step}),
)
schemas = st.recursive(
    leaves,
    lambda inner: st.one_of(
        inner.map(lambda item: {"type": "array", "items": item, "maxItems": 2}),
        st.builds(
            lambda name, item: {
                "type": "object",
                "properties": {name: item},
                "required": [name],
                "additionalProperties": False,
            },
            st.sampled_from(["enum", "const", "minimum", "p"]),
            inner,
        ),
        inner.map(lambda item: {"anyOf": [item, {"type": "null"}]}),
    ),
    max_leaves=2,
).flatmap(lambda schema: st.sampled_from([schema, {"$ref": "#/$defs/enum", "$defs": {"enum": schema}}]))


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(schema=schemas)
def test_every_finished_answer_validates(maker: Maker, schema: Any) -> None:
    try:
        check(maker, schema, walks=3)
    except GuideError as error:
        assume("\n" not in str(error))


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(limits=bounds, kind=st.sampled_from(["integer", "number"]))
def test_bounds_move_inwards_only(limits: dict[str, Any], kind: str) -> None:
    schema = {"type": kind, **limits}
    try:
        moved = exact_schema(schema)
    except SchemaError:
        return
    for key in ("minimum", "maximum"):
        if key in moved:
            assert not [
                e for e in jsonschema.Draft202012Validator(schema).iter_errors(moved[key]) if e.validator == key
            ]
            assert moved[key] == float(moved[key])


@pytest.mark.parametrize(
    ("schema", "answers"),
    [
        ({"type": "integer", "minimum": EXACT, "maximum": EXACT + 3}, {EXACT, EXACT + 1, EXACT + 2}),
        ({"type": "integer", "exclusiveMinimum": EXACT + 1, "exclusiveMaximum": EXACT + 3}, {EXACT + 2}),
        ({"type": "integer", "minimum": 0.5, "exclusiveMaximum": 3}, {1, 2}),
        ({"const": EXACT}, {EXACT}),
        ({"enum": [10**16, -(10**22), 1.1e20]}, {10**16, -(10**22), 110000000000000000000}),
    ],
)
def test_what_can_be_kept_is(maker: Maker, schema: Any, answers: set[int]) -> None:
    assert {json.loads(answer) for answer in check(maker, schema, walks=40)} == answers


def test_limits_of_64_bits_are_taken(maker: Maker) -> None:
    schema = {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}
    assert exact_schema(schema) == {"type": "integer", "minimum": 1024 - 2**63, "maximum": 2**63 - 1024}
    assert check(maker, schema) and check(maker, {"type": "integer", "minimum": -(10**400)})


def test_a_bound_that_is_harmless_stays_itself() -> None:
    schema = {"type": "number", "minimum": 0.1, "maximum": 99.5}
    assert exact_schema(schema) == schema
    assert exact_schema({"type": "number", "exclusiveMaximum": 1}) == {
        "type": "number",
        "maximum": 0.999999999999999,
    }
    assert exact_schema({"type": "number", "exclusiveMinimum": 0}) == {"type": "number", "minimum": 1e-20}
    assert exact_schema({"properties": {"enum": {"type": "string"}}, "default": LARGE})["default"] == LARGE


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"enum": [1, LARGE]}, f"enum[1]: {LARGE} cannot be kept exactly (allowed -{EXACT}..{EXACT}; as a "),
        ({"properties": {"n": {"const": {"a": [LARGE]}}}}, f"properties.n.const.a[0]: {LARGE} cannot be kept exactly"),
        ({"type": "integer", "minimum": 2**64}, f"minimum: {2**64} is too large to be kept exactly"),
        ({"type": "integer", "minimum": LARGE, "maximum": LARGE + 5}, f"between minimum {LARGE}, maximum {LARGE + 5}"),
        ({"anyOf": [{"type": "number", "multipleOf": 0.01}]}, "anyOf[0].multipleOf: 0.01 cannot be kept exactly"),
        ({"multipleOf": 2**53 + 1}, f"multipleOf: {2**53 + 1} cannot be kept exactly (allowed whole numbers up to 42"),
        ({"$ref": "https://x.org/y"}, "put it into $defs"),
        ({"$schema": "http://json-schema.org/draft-03/schema#"}, "is not supported (allowed draft-04 or newer)"),
        ({"type": "string", "pattern": "^(?=a)b"}, "pattern: look-ahead and look-behind ((?=...) are not supported"),
        ({"type": "string", "format": "regexp"}, "Unknown format: regexp; leave it out, or give a pattern"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf needs choices that exclude each other"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, "no value matches it"),
        ({"type": "array", "uniqueItems": True}, 'Unimplemented keys: ["uniqueItems"]; leave them out'),
    ],
)
def test_a_refusal_says_what_to_do(maker: Maker, schema: Any, message: str) -> None:
    with pytest.raises(GuideError, match=re.escape(message)) as caught:
        json_guide(maker, json.dumps(schema))
    assert "\n" not in str(caught.value) and "coerce_one_of" not in str(caught.value)


def test_a_tools_parameters_are_kept_as_exactly(maker: Maker) -> None:
    from gpt_fast.text.chat import HERMES

    tool = {"function": {"name": "f", "parameters": {"properties": {"n": {"const": LARGE}}}}}
    with pytest.raises(GuideError, match=rf"^f\.properties\.n\.const: {LARGE} cannot be kept exactly"):
        maker.calls_guide([tool], HERMES)


# ---------------------------------------------------------------------------------------- pydantic's


class Cat(BaseModel):
    kind: Literal["cat"]


class Dog(BaseModel):
    kind: Literal["dog"]
    age: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]


class Pets(BaseModel):
    pet: Annotated[Cat | Dog, Field(discriminator="kind")]


TYPES = [Path, FilePath, SecretStr, bytes, Pets, Dog, Annotated[float, Field(gt=0, lt=1)], int | float]
# Which spellings are these, JSON Schema does not say; pydantic does.
SPELLED = [UUID1, UUID3, UUID4, UUID5, UUID7, Base64Bytes, Base64UrlBytes]


@pytest.mark.parametrize("annotation", SPELLED, ids=str)
def test_what_pydantic_spells_in_a_way_of_its_own_it_reads(maker: Maker, annotation: Any) -> None:
    adapter = TypeAdapter(annotation)
    schema = adapter.json_schema()
    answers = check(maker, schema | ({"maxLength": 9} if "uuid" not in schema["format"] else {}), walks=30)
    assert answers
    for answer in answers:
        adapter.validate_json(answer)


DRAFTS = ["http://json-schema.org/draft-07/schema#", "https://json-schema.org/draft/2020-12/schema", "https://x.org/y",
          "http://json-schema.org/schema#", "https://json-schema.org/draft-07/schema"]  # fmt: skip


@pytest.mark.parametrize("draft", DRAFTS)
def test_a_draft_that_nobody_knows_is_the_newest(maker: Maker, draft: str) -> None:
    """As a validator takes it."""
    items = {"prefixItems": [{"const": 1}], "items": {"const": 2}}  # of which draft-07 knows but the second
    schema = {"$schema": draft, "type": "array", **items, "minItems": 2, "maxItems": 2}
    validator = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)(schema)
    wanted = [value for value in ([1, 2], [2, 2]) if validator.is_valid(value)]
    answers = [json.loads(answer) for seed in range(5) if (answer := walk(maker, schema, seed))]
    assert answers and all(answer in wanted for answer in answers) and len(wanted) == 1


@pytest.mark.parametrize("annotation", TYPES, ids=str)
def test_pydantics_schemas_are_taken(maker: Maker, annotation: Any) -> None:
    schema = TypeAdapter(annotation).json_schema()
    bounded = schema | ({"maxLength": 5} if schema.get("type") == "string" else {})
    assert check(maker, bounded, walks=30)


HEAD = r"^(?!^[-+.]*$)[+-]?0*"
OLD_DECIMALS = [
    HEAD + r"\d*\.?\d*$",
    HEAD + r"\d*\.?\d{0,2}0*$",
    HEAD + r"(?:\d{0,3}|(?=[\d.]{1,6}0*$)\d{0,3}\.\d{0,2}0*$)",
    HEAD + r"(?:\d{0,0}|(?=[\d.]{1,4}0*$)\d{0,0}\.\d{0,3}0*$)",
    HEAD + r"(?:\d{0,5}|(?=[\d.]{1,6}0*$)\d*\.\d*0*$)",
]


@pytest.mark.parametrize("pattern", OLD_DECIMALS)
def test_pydantics_old_decimal_patterns_are_taken(maker: Maker, pattern: str) -> None:
    schema = {"anyOf": [{"type": "string", "pattern": pattern}, {"type": "null"}]}
    answers = [json.loads(answer) for answer in check(maker, schema, walks=60)]
    assert any(answer and "." in answer for answer in answers) and any(answer and "-" in answer for answer in answers)


@pytest.mark.parametrize(
    ("pattern", "taken", "not_taken"),
    [
        (r"^\w$", "aZ_9", "é٣\u0301!"),
        (r"^[^\w]$", "! ", "éa²"),
        (r"^\d$", "07", "٣a"),
        (r"^\D$", "x-", "3٣"),
        (r"^\s$", " \n", "\u2003\x1c"),
        (r"^[^\s]$", "xé", " \u2003\ufeff"),
        (r"^[]a]$", "]a", "b"),
    ],
)
def test_classes_of_a_pattern_are_what_every_validator_agrees_on(maker, pattern, taken, not_taken) -> None:
    """ECMA's are ASCII, Python's are not: jsonschema and a browser both take what is let through."""
    schema = {"type": "string", "pattern": pattern}
    for text in taken:
        jsonschema.validate(text, schema)
    for text in taken + not_taken:
        guide, output = json_guide(maker, json.dumps(schema)), [*json.dumps(text, ensure_ascii=False).encode(), EOS]
        assert all(guide.allowed(output[:at])[token] for at, token in enumerate(output)) == (text in taken), text
