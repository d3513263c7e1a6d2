"""JSON schemas that tests ask for."""

import json

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
