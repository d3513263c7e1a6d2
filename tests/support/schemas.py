"""JSON schemas that tests ask for."""

import json

from gpt_fast.text.grammar import Constraint, Guide, Maker

# Fifty regular expressions of which the compiler wants to know whether any text matches all.
SLOW = json.dumps({"allOf": [{"type": "string", "pattern": f".*[ab].{{{n}}}c.*"} for n in range(10, 60)]})
POINT = json.dumps(
    {
        "type": "object",
        "required": ["x", "unit"],
        "additionalProperties": False,
        "properties": {"x": {"type": "integer", "minimum": -99, "maximum": 99}, "unit": {"enum": ["mm", "in"]}},
    }
)


def json_guide(maker: Maker, schema: str) -> Guide:
    return maker.guide(Constraint("json", schema))
