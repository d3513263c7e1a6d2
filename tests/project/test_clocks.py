"""A clock that jumps (NTP, a suspended machine, a user) decides nothing: waits and ages are of a monotonic clock."""

from __future__ import annotations

import ast
from pathlib import Path

from support.paths import ROOT

WALL = {"time.time", "time.time_ns", "datetime.now", "datetime.utcnow", "datetime.today", "date.today"}
TOLD = {  # read to be told to somebody, or because a date is what counts
    "gpt_fast/serve/admission.py": "when a model was made: /models says it",
    "gpt_fast/serve/stamp.py": "an answer's `created`",
    "gpt_fast/text/template_process.py": "chat templates ask for today's date",
    "gpt_fast/bench/gpu/cold.py": "compared between two processes, by the command that measures starts",
    "scripts/audit.py": "a flaw is excused until a day",
}


def wall_clock_calls(path: Path) -> list[int]:
    """The lines that read the wall clock."""
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    return [call.lineno for call in calls if ".".join(ast.unparse(call.func).split(".")[-2:]) in WALL]


def test_the_wall_clock_decides_nothing():
    served = [ROOT / "handler.py", *(ROOT / "gpt_fast").rglob("*.py"), *(ROOT / "scripts").glob("*.py")]
    found = {str(path.relative_to(ROOT)): lines for path in served if (lines := wall_clock_calls(path))}
    assert found.keys() == TOLD.keys(), found


def test_every_spelling_is_found(tmp_path):
    module = tmp_path / "module.py"
    module.write_text("import time, datetime\ntime.time()\ndatetime.datetime.now(tz)\ntime.monotonic()\n")
    assert wall_clock_calls(module) == [2, 3]
