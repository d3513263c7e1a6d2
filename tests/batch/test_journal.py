"""The journal keeps every whole answer once, whatever was cut off or damaged at its end."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt_fast.batch.journal import Journal
from support.examples import examples

BATCH = {"input": "x", "seed": 1}
LINES = {number: json.dumps({"n": number, "text": "é\u2028" * (number % 3)}) for number in range(1, 9)}
ORDER = (3, 1, 2, 8, 5, 4, 7, 6)


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out.jsonl"


def opened(output, **changes):
    return Journal(output, {**BATCH, **changes}, last=8)


def fill(journal, numbers):
    for number in numbers:
        journal.add(number, LINES[number])


def test_the_output_is_in_the_rows_order_and_the_rest_is_gone(output):
    with opened(output) as journal:
        fill(journal, ORDER)
        assert list(journal.lines()) == list(LINES.values())
        journal.finish()
    assert output.read_text(encoding="utf-8") == "".join(f"{line}\n" for line in LINES.values())
    assert list(output.parent.iterdir()) == [output]


@given(st.data())
@examples(60)
def test_what_was_cut_or_damaged_is_made_again(tmp_path_factory, data):
    """Only the end can be lost: the system keeps what was written before it."""
    output = tmp_path_factory.mktemp("journal") / "out.jsonl"
    with opened(output) as journal:
        fill(journal, ORDER)
    whole = journal.path.read_bytes()
    cut = data.draw(st.integers(0, len(whole)), label="cut")
    garbage = data.draw(st.sampled_from([b"", b"\0" * 40, b"5 00000000 {}\n", b"x\n\n", b"9999 "]), label="garbage")
    journal.path.write_bytes(whole[:cut] + garbage)
    if cut < whole.index(b"\n") + 1 and b"\n" in garbage:
        return  # a first line that was cut has nothing behind it
    with opened(output) as journal:
        kept = [n for n in LINES if n in journal]
        if not garbage:
            assert len(kept) == max(whole[:cut].count(b"\n") - 1, 0)
        assert journal.done == len(kept)
        fill(journal, ORDER)  # those that are there are not kept twice
        assert list(journal.lines()) == list(LINES.values())
    with opened(output) as journal:
        assert journal.done == 8


def test_an_answer_is_kept_once(output):
    with opened(output) as journal:
        assert journal.add(2, LINES[2])
        assert not journal.add(2, LINES[3])
        assert list(journal.lines()) == [LINES[2]]
    assert journal.path.read_bytes().count(b"\n") == 2


def test_another_batch_is_refused(output):
    opened(output).__exit__()
    with pytest.raises(ValueError, match=r"is of another batch: seed differs \(got 2, begun with 1\); remove it"):
        opened(output, seed=2)
    output.with_name("out.jsonl.partial").write_text("hello\n")
    with pytest.raises(ValueError, match="is damaged, or no batch's; remove it"):
        opened(output)


def test_an_output_that_is_there_is_left_alone(output):
    output.write_text("precious")
    with pytest.raises(ValueError, match="is there already; remove it, or name another --output"):
        opened(output)
    assert output.read_text() == "precious"
    assert list(output.parent.iterdir()) == [output]


def test_an_end_between_the_output_and_the_journals_removal_is_taken_up(output):
    with opened(output) as journal:
        fill(journal, ORDER)
        kept = journal.path.read_bytes()
        journal.finish()
    first = output.read_bytes()
    journal.path.write_bytes(kept)  # killed before it was removed
    with opened(output) as journal:
        assert journal.done == 8
        journal.finish()
    assert output.read_bytes() == first
    assert list(output.parent.iterdir()) == [output]


def test_one_process_at_a_time(output):
    with opened(output), pytest.raises(ValueError, match="another process is writing it"):
        opened(output)
