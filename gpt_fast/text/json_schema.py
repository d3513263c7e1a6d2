"""A JSON schema as the grammar compiler can keep it exactly: whatever a guide lets through validates.

llguidance reads every number as a double, so large integers change, and its bounds are decimals that may round past a
bound when a client reads them. Here bounds move inwards to numbers that survive (by less than what doubles can tell
apart, and never outwards), formats that say nothing of a text are dropped, patterns that pydantic wrote with look-ahead
are written without, and what cannot be kept is refused. Errors are SchemaError, one line naming place and way out.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from decimal import ROUND_CEILING, Context, Decimal
from typing import Any

from gpt_fast.text.regex_dialect import with_plain_classes

EXACT = 2**53  # up to here doubles are exact for integers
INTEGER_LIMIT = 2**63 - 1024  # the largest double that the compiler's 64-bit bounds hold
NUMBER_LIMIT = 10**17  # beyond it the compiler makes no expression of a bound that is no integer's
MULTIPLE_LIMIT = 2**32 - 1  # the compiler takes no larger divisor
SMALLEST = 1e-20  # bounds nearer to 0 than this make expressions of hundreds of digits
INWARD = Context(prec=15, rounding=ROUND_CEILING)  # the compiler rounds fractions of more digits, as it happens up
VALUES = ("enum", "const")
ANNOTATIONS = ("default", "examples", "example")
BOUNDS = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum")
# Those that the compiler knows; of another, a validator takes the newest draft, which is the compiler's default.
DRAFTS = re.compile(r"(http://json-schema\.org/draft-0[467]|https://json-schema\.org/draft/(2019-09|2020-12))/schema#?")
# pydantic's and OpenAPI's formats that a pattern spells out.
HEX = "[0-9a-f]"
FORMAT_PATTERNS = {
    **{
        f"uuid{version}": f"^{HEX}{{8}}-{HEX}{{4}}-{version}{HEX}{{3}}-[89ab]{HEX}{{3}}-{HEX}{{12}}$"
        for version in range(1, 9)
    },
    **dict.fromkeys(("base64", "byte"), "^([A-Za-z0-9+/]{4})*([A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$"),
    "base64url": "^([A-Za-z0-9_-]{4})*([A-Za-z0-9_-]{2}==|[A-Za-z0-9_-]{3}=)?$",
}
# They say what a text is for, not how it is spelled; JSON Schema lets a validator pass them over.
PLAIN_FORMATS = ("path", "file-path", "directory-path", "password", "binary")


class SchemaError(ValueError):
    """A schema that no grammar can keep exactly, in one line."""


def exact_schema(schema: Any, where: str = "") -> Any:
    """The schema with every part of it as described above. A part that is no object stays as it is."""
    if not isinstance(schema, dict):
        return schema
    out = {}
    for key, value in schema.items():
        at = f"{where}.{key}" if where else key
        if key in VALUES:
            check_exact(value, at)
        elif key not in ANNOTATIONS and isinstance(value, dict):
            value = exact_schema(value, at) if key not in NAMED_SCHEMAS else each(value, at)
        elif key not in ANNOTATIONS and isinstance(value, list):
            value = [exact_schema(item, f"{at}[{index}]") for index, item in enumerate(value)]
        out[key] = value
    if isinstance(out.get("$schema"), str) and not DRAFTS.fullmatch(out["$schema"]):
        refuse_old_draft(out.pop("$schema"), where)
    if out.get("format") in PLAIN_FORMATS:
        del out["format"]
    elif out.get("format") in FORMAT_PATTERNS and "pattern" not in out:
        out["pattern"] = FORMAT_PATTERNS[out.pop("format")]
    if isinstance(out.get("pattern"), str):
        out["pattern"] = with_plain_classes(without_look_ahead(out["pattern"], f"{where}.pattern".lstrip(".")))
    multiple = out.get("multipleOf")
    if isinstance(multiple, int | float) and not (float(multiple).is_integer() and abs(multiple) <= MULTIPLE_LIMIT):
        raise SchemaError(
            f"{where}.multipleOf: ".lstrip(".") + f"{number(multiple)} cannot be kept exactly "
            f"(allowed whole numbers up to {MULTIPLE_LIMIT}; or give a string a pattern)"
        )
    return with_exact_bounds(out, where)


def refuse_old_draft(draft: str, where: str) -> None:
    if re.search("json-schema.org/draft-0[0-3]", draft):
        raise SchemaError(
            f"{where}.$schema: ".lstrip(".") + f"{number(draft)} is not supported (allowed draft-04 or newer)"
        )


# Keywords whose object names schemas: a property may be called "enum".
NAMED_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")


def each(schemas: dict[str, Any], where: str) -> dict[str, Any]:
    return {name: exact_schema(schema, f"{where}.{name}") for name, schema in schemas.items()}


def check_exact(value: Any, where: str) -> None:
    """Refuse a value that holds a number which the compiler would change."""
    if isinstance(value, list):
        for index, item in enumerate(value):
            check_exact(item, f"{where}[{index}]")
    elif isinstance(value, dict):
        for name, item in value.items():
            check_exact(item, f"{where}.{name}")
    elif isinstance(value, int | float) and not is_exact(value):
        raise SchemaError(
            f"{where}: {number(value)} cannot be kept exactly (allowed -{EXACT}..{EXACT}; as a string it can)"
        )


def is_exact(value: int | float) -> bool:
    """Whether a double holds the number, and its shortest decimal as well."""
    return abs(value) <= EXACT or (abs(value) < 2**1023 and set(spellings(float(value))) == {Decimal(value)})


def with_exact_bounds(schema: dict[str, Any], where: str) -> dict[str, Any]:
    """Bounds as "minimum" and "maximum" that no rounding passes."""
    if not any(is_number(schema.get(key)) for key in BOUNDS):
        return schema
    whole = schema.get("type") == "integer"
    below = [(schema[key], key) for key in BOUNDS[:2] if is_number(schema.get(key))]
    above = [(schema[key], key) for key in BOUNDS[2:] if is_number(schema.get(key))]
    low = max((lowest(value, key, whole, where) for value, key in below), default=None)
    high = min((-lowest(-value, key, whole, where) for value, key in above), default=None)
    if low is not None and high is not None and low > high:
        given = ", ".join(f"{key} {number(value)}" for value, key in (*below, *above))
        raise SchemaError(f"{where}: ".lstrip(": ") + f"no number that can be kept exactly lies between {given}")
    out = {key: value for key, value in schema.items() if key not in BOUNDS}
    return out | {key: value for key, value in (("minimum", low), ("maximum", high)) if value is not None}


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def lowest(bound: int | float, key: str, whole: bool, where: str) -> int | float:
    """The least number that may be given to the compiler as a lower bound for `bound`. Upper bounds come negated.

    It is a double that satisfies the bound however the compiler spells it.
    """
    exclusive, limit = key.startswith("exclusive"), INTEGER_LIMIT if whole else NUMBER_LIMIT
    if whole:
        bound, exclusive = (math.floor(bound) + 1 if exclusive else math.ceil(bound)), False
    if bound < -limit:
        return -limit
    if bound > limit:
        raise SchemaError(
            f"{where}.{key}: ".lstrip(".") + f"{number(bound)} is too large to be kept exactly (allowed up to {limit})"
        )
    if abs(bound) < SMALLEST:
        return SMALLEST if bound > 0 or (bound == 0 and exclusive) else 0
    found, exact = float(bound), Decimal(bound)

    def fits(value: float) -> bool:
        return min(spellings(value)) > exact or (min(spellings(value)) == exact and not exclusive)

    while whole and not fits(found):
        found = math.nextafter(found, math.inf)
    short = INWARD.plus(exact)
    if not fits(found) or not (found.is_integer() or len(Decimal(repr(found)).as_tuple().digits) <= INWARD.prec):
        while not fits(float(short)):
            short = INWARD.next_plus(short)
        found = float(short)
    return int(found) if found.is_integer() else found


def spellings(value: float) -> tuple[Decimal, Decimal]:
    """What a client may read where the compiler spells this double: of digits without a point, it reads an integer."""
    return Decimal(value), Decimal(repr(value)) if value.is_integer() else Decimal(value)


def number(value: object) -> str:
    return json.dumps(value)


# ------------------------------------------------------------------------------------------ patterns

# pydantic's patterns of a Decimal as text, before 2.14: at least one digit, and with max_digits and decimal_places a
# look-ahead that counts the digits of both sides of the point. The replacements match nothing else, and all numbers
# without needless zeros.
DECIMAL_HEAD = re.escape(r"^(?!^[-+.]*$)[+-]?0*")
DECIMALS: tuple[tuple[str, Callable[..., str]], ...] = (
    (r"\\d\*\\\.\?\\d\*\$", lambda: r"[0-9]+(\.[0-9]*)?|\.[0-9]+"),
    (r"\\d\*\\\.\?\\d\{0,(\d+)\}0\*\$", lambda places: rf"[0-9]+(\.[0-9]{{0,{places}}})?"),
    (
        r"\(\?:\\d\{0,(\d+)\}\|\(\?=\[\\d\.\]\{1,(\d+)\}0\*\$\)\\d\{0,\1\}\\\.\\d\{0,(\d+)\}0\*\$?\)\$?",
        lambda whole, length, places: (
            f"{'0' if not whole else f'[0-9]{{1,{whole}}}'}"
            rf"(\.[0-9]{{0,{max(0, min(places, length - 1 - whole))}}})?"
        ),
    ),
    (
        r"\(\?:\\d\{0,(\d+)\}\|\(\?=\[\\d\.\]\{1,\d+\}0\*\$\)\\d\*\\\.\\d\*0\*\$?\)\$?",
        lambda digits: "|".join(rf"[0-9]{{{n}}}(\.[0-9]{{0,{digits - n}}})?" for n in range(1, digits + 1)) or "0",
    ),
)


def without_look_ahead(pattern: str, where: str) -> str:
    """The pattern, or one without look-ahead in the place of pydantic's; other look-around is refused."""
    for rest, make in DECIMALS:
        if found := re.fullmatch(DECIMAL_HEAD + rest, pattern):
            return f"^[+-]?({make(*map(int, found.groups()))})$"
    if around := re.search(r"(?<!\\)\(\?<?[=!]", pattern):
        raise SchemaError(
            f"{where}: look-ahead and look-behind ({around[0]}...) are not supported, write the pattern without"
        )
    return pattern
