"""Constraints that would keep a compiler busy: refused, or compiled, in bounded time and memory, and one line each."""

import json
import resource
import time

import pytest

from gpt_fast.text.grammar import Constraint, GuideError, Maker
from support.tiny_engine import ByteTokenizer


def nested(depth: int) -> dict:
    """Every definition names the next one twice: 2^depth of them written out."""
    names = {f"d{i}": {"type": "array", "prefixItems": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(depth)}
    return {"$defs": names | {f"d{depth}": {"type": "null"}}, "$ref": "#/$defs/d0"}


def choices(depth: int) -> dict:
    schema: dict = {"type": "string"}
    for _ in range(depth):
        schema = {"anyOf": [schema, {"allOf": [schema, {"type": "object"}]}]}
    return schema


def json_schema(schema: object) -> Constraint:
    return Constraint("json", json.dumps(schema))


BOMBS = {
    "definitions": json_schema(nested(40)),
    "choices": json_schema(choices(9)),
    "a circle": json_schema({"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}),
    "a circle of choices": json_schema({"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}] * 8}}, "$ref": "#/$defs/a"}),
    "enum": json_schema({"enum": [f"{i:09}" for i in range(5000)]}),
    "enum, too large": json_schema({"enum": [f"{i:09}" for i in range(60_000)]}),
    "lengths": json_schema({"type": "string", "minLength": 10**6, "maxLength": 10**9}),
    "items": json_schema({"type": "array", "minItems": 10**6, "maxItems": 10**9, "items": {"type": "integer"}}),
    "numbers": json_schema({"type": "number", "minimum": -1e300, "maximum": 1e-300, "multipleOf": 1e-200}),
    "pattern": json_schema({"type": "string", "pattern": "(a{1,1000}){1,1000}"}),
    "properties": json_schema({"patternProperties": {f"^(a|b){{0,{i}}}c": {} for i in range(60)}}),
    "depth": Constraint("json", '{"items":' * 5000 + "{}" + "}" * 5000),
    "repeats": Constraint("regex", "((((a{0,99}){0,99}){0,99}){0,99}){0,99}"),
    "alternatives": Constraint("regex", "(x+x+)+y" + "(a?){64}a{64}" * 8 + "(.*)" * 40),
    "unions": Constraint("regex", "|".join(f".*{a}.{{{b}}}{a}" for a in "abcdefgh" for b in range(60, 70))),
    "choice": Constraint("choice", json.dumps([f"{i}" * 5 for i in range(7000)])),
    "grammar": Constraint("grammar", "root ::= (" + "(" * 300 + '"a"' + ")?" * 300 + ")"),
    "left recursion": Constraint("grammar", 'root ::= root root root | root "a" | ""'),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_bounded(name):
    maker = Maker(ByteTokenizer(), vocab_size=300, eos_ids=[0])
    mine, started = resource.getrusage(resource.RUSAGE_SELF), time.process_time()
    try:
        guide = maker.guide(BOMBS[name])
        guide.allowed([])
    except GuideError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000
    assert time.process_time() - started < 5  # of our own process, whose lock all others need
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - mine.ru_maxrss
    assert grown < 300 << 10  # KiB
