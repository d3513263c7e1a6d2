"""scripts/heavy_neighbour.py: its requests are the largest that are taken, no two alike, and its table is whole."""

from __future__ import annotations

import json
import subprocess
import sys
from random import Random

import pytest

from gpt_fast.serve.body import MAX_BODY
from gpt_fast.serve.constraints import MAX_CONSTRAINT, parse_constraint
from support.paths import ROOT
from support.round_server import RoundServer
from support.tiny_engine import tiny_engine

sys.path.insert(0, str(ROOT / "scripts"))

from heavy_neighbour import KINDS, salted


@pytest.mark.parametrize("kind", KINDS)
def test_a_body_is_as_large_as_may_be_and_never_the_same(kind):
    made = KINDS[kind](Random(0))
    first, second, _ = zip(salted(json.dumps(made).encode(), Random(1)), range(3), strict=False)
    constraint, _ = parse_constraint({name: value for name, value in made.items() if name != "messages"})
    if constraint is not None:
        assert MAX_CONSTRAINT * 0.75 < len(constraint.text) <= MAX_CONSTRAINT
    elif kind != "text, encoded":
        assert MAX_BODY * 0.9 < len(first[0]) <= MAX_BODY
    assert (first[0] != second[0]) == (kind != "token ids")  # which are too many, and looked up nowhere


@pytest.mark.slow
def test_the_table_of_a_run():
    with RoundServer(tiny_engine(slots=4, max_seq_len=512)) as server:
        arguments = ["--url", server.url, "--kinds", "text", "regex", "--streams", "2", "--max_new_tokens", "200"]
        command = [sys.executable, "scripts/heavy_neighbour.py", *arguments, "--rounds", "1", "--seconds", "0.5"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    *table, last = done.stdout.splitlines()
    turns = json.loads(last)["turns"]
    assert [line.split()[0] for line in table[1:]] == list(turns) == ["quiet", "text", "regex"]
    assert all(turns[kind]["requests"] for kind in ("text", "regex")) and all(each["gaps"] for each in turns.values())
    assert "prompt: " in turns["text"]["refused"][0] and turns["regex"]["refused"] == []
