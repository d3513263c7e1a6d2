"""What an answer must match, in each way that clients say it: OpenAI's response_format, vLLM's structured_outputs (and
the guided_* fields it replaced), llama-server's grammar and json_schema. Checked JSON in, a Constraint out. No torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from gpt_fast.serve.body import RequestError, expect, short
from gpt_fast.text.grammar import Constraint

MAX_CONSTRAINT = 32_768  # bytes of a schema (as JSON in ASCII), an expression, a grammar, or all choices
ANY_OBJECT = '{"type": "object"}'
FORMAT_FIELDS = {"text": ("type",), "json_object": ("type", "schema"), "json_schema": ("type", "json_schema")}
KINDS = ("json", "regex", "choice", "grammar", "json_object")
# Of vLLM's options, those that change nothing here: the values that pass.
OPTIONS: Mapping[str, tuple[Any, ...]] = {
    "disable_any_whitespace": (True, False),
    "disable_fallback": (True, False),
    "disable_additional_properties": (False,),
    "whitespace_pattern": (),
    "structural_tag": (),
}


def parse_constraint(fields: Mapping[str, Any]) -> tuple[Constraint | None, str]:
    """The constraint of a request and the field that says it; (None, "") for any text. More than one is refused."""
    found = [(each, name) for name in READERS if name in fields and (each := READERS[name](fields[name], name))]
    if len(found) > 1:
        (_, first), (_, second) = found[:2]
        raise RequestError(f"{second}: one constraint is allowed (got {first} too), leave one out", param=second)
    return found[0] if found else (None, "")


def response_format(value: object, where: str) -> Constraint | None:
    expect(value, where, dict, "an object with a type")
    fields: dict[str, Any] = value  # type: ignore[assignment]
    kind = fields.get("type")
    if kind not in FORMAT_FIELDS:
        raise refuse(f"{where}.type", f"unknown (got {short(kind)}, allowed {', '.join(FORMAT_FIELDS)})")
    check_names(fields, where, FORMAT_FIELDS[kind])
    if kind == "text":
        return None
    if kind == "json_object":  # llama-server and others take a schema beside it
        given = fields.get("schema")
        return Constraint("json", ANY_OBJECT) if given is None else json_schema(given, f"{where}.schema")
    named = fields.get("json_schema")
    expect(named, f"{where}.json_schema", dict, "an object with name and schema")
    check_names(named, f"{where}.json_schema", ("name", "schema", "description", "strict"))
    return json_schema(named.get("schema"), f"{where}.json_schema.schema")  # type: ignore[union-attr]


def structured_outputs(value: object, where: str) -> Constraint | None:
    """vLLM's object: exactly one of its kinds, and options."""
    expect(value, where, dict, f"an object with one of {', '.join(KINDS)}")
    fields = {name: each for name, each in value.items() if each is not None}  # type: ignore[attr-defined]
    check_names(fields, where, (*KINDS, *OPTIONS))
    for name in OPTIONS.keys() & fields.keys():
        if not any(fields[name] is each for each in OPTIONS[name]):
            allowed = ", ".join(map(short, (None, *OPTIONS[name])))
            raise refuse(f"{where}.{name}", f"not supported (got {short(fields[name])}, allowed {allowed})")
    kinds = [name for name in KINDS if name in fields]
    if len(kinds) != 1:
        raise refuse(where, f"needs exactly one of {', '.join(KINDS)} (got {', '.join(kinds) or 'none'})")
    (kind,) = kinds
    compact = fields.get("disable_any_whitespace", False)
    if kind != "json_object":
        return PARSERS[kind](fields[kind], f"{where}.{kind}")._replace(compact=compact)
    expect(fields[kind], f"{where}.{kind}", bool, "true or false")
    return Constraint("json", ANY_OBJECT, compact) if fields[kind] else None


def json_schema(value: object, where: str) -> Constraint:
    expect(value, where, dict, "a JSON schema, an object")
    return Constraint("json", bounded(json.dumps(value), where))


def json_or_text(value: object, where: str) -> Constraint:
    """A schema, as JSON or as a string of it."""
    if isinstance(value, str):
        bounded(value, where)
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise refuse(where, f"is no JSON (got {short(value)}, allowed a JSON schema)") from None
    return json_schema(value, where)


def regex(value: object, where: str) -> Constraint:
    return Constraint("regex", text(value, where, "a regular expression"))


def grammar(value: object, where: str) -> Constraint:
    return Constraint("grammar", text(value, where, "a grammar in GBNF or Lark"))


def choice(value: object, where: str) -> Constraint:
    expect(value, where, list, "a list of strings")
    if not value or not all(isinstance(each, str) for each in value):  # type: ignore[attr-defined]
        raise refuse(where, f"must be strings, at least one (got {short(value)})")
    return Constraint("choice", bounded(json.dumps(value), where))


def text(value: object, where: str, what: str) -> str:
    expect(value, where, str, f"{what}, a string")
    if not value:
        raise refuse(where, f'must be {what}, not empty (got "")')
    return bounded(str(value), where)


def bounded(value: str, where: str) -> str:
    size = len(value.encode())
    if size > MAX_CONSTRAINT:
        raise refuse(where, f"{size} bytes (allowed {MAX_CONSTRAINT})")
    return value


def check_names(value: Any, where: str, allowed: tuple[str, ...]) -> None:
    for name in value:
        if name not in allowed:
            raise refuse(f"{where}.{name}", f"unknown field (allowed {', '.join(allowed)})")


def refuse(where: str, problem: str) -> RequestError:
    shown = where if len(where) <= 100 else where[:97] + "..."
    return RequestError(f"{shown}: {problem}", param=where)


PARSERS: Mapping[str, Callable[[object, str], Constraint]] = {
    "json": json_or_text,
    "regex": regex,
    "choice": choice,
    "grammar": grammar,
}
READERS: Mapping[str, Callable[[Any, str], Constraint | None]] = {
    "response_format": response_format,
    "structured_outputs": structured_outputs,
    "grammar": lambda value, where: grammar(value, where) if value != "" else None,  # llama-server's default
    "json_schema": json_schema,
    "guided_json": json_or_text,
    "guided_regex": regex,
    "guided_choice": choice,
    "guided_grammar": grammar,
}
CONSTRAINTS = frozenset(READERS)
