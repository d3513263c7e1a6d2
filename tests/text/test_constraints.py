"""Answers that match a regular expression, one of several texts, or a grammar: each that ends is held to `re`, to the
list, or to a reader written here."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt_fast.config import SamplingParams
from gpt_fast.text.grammar import Constraint, GuideError, Maker
from gpt_fast.text.grammar_check import Checked
from gpt_fast.text.regex_dialect import RegexError, respelled
from support.examples import examples
from support.tiny_engine import EOS, ByteTokenizer, tiny_engine


@pytest.fixture(scope="module")
def engine():
    return tiny_engine(slots=4, max_seq_len=256)


@pytest.fixture(scope="module")
def maker():
    return Maker(ByteTokenizer(), vocab_size=257, eos_ids={EOS})


def answers(engine, guides, *, most=120, heat=3.0):
    """The texts that ended by themselves, of a random model at high temperature: anything that is allowed may come."""
    params = [
        SamplingParams(max_new_tokens=most, seed=seed, temperature=heat, guide=guide)
        for seed, guide in enumerate(guides)
    ]
    made = engine.generate(["say"] * len(guides), params)
    return [answer.text for answer in made if answer.finish_reason == "stop"]


def trusted(maker, constraint):
    """A guide without the check in a process of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gpt_fast.text.grammar.check", lambda grammar: Checked("", grammar))
        return maker.guide(constraint)


# --------------------------------------------------------------------------------------- expressions

ATOMS = [
    r"\d", r"\w", r"\s", r"\D", r"\W", r"\S", "a", "é", ".", "[a-c]", r"[^\w]", r"[\W_]", r"[^\s]", r"[\D]", "[]a]",
    "[^]a]", "[[a]", "[a&&b]", r"[\-x]", r"\<", r"\-", r"\ ", r"\x41", r"\u00e9", r"\101", "(ab|c)", "(?:x|y)", "[a-]",
    r"[\b]", r"\.", r"\/", '"', "[+--]", "(?i:k)", "[^\\d\\s]",
]  # fmt: skip
REPEATS = ["", "", "", "*", "+", "?", "*?", "+?", "{2}", "{1,2}", "{,2}", "{2}?"]
parts = st.tuples(st.sampled_from(ATOMS), st.sampled_from(REPEATS)).map("".join)
patterns = st.builds(
    lambda most, anchored, other: ("^{}$" if anchored and not other else "{}").format("".join(most) + other),
    st.lists(parts, min_size=1, max_size=4),
    st.booleans(),
    st.sampled_from(["", "", "|q"]),
)


@pytest.mark.slow
@examples(60)
@given(drawn=st.lists(patterns, min_size=4, max_size=4))
def test_every_finished_answer_fully_matches_its_expression(engine, maker, drawn):
    guides = [trusted(maker, Constraint("regex", pattern)) for pattern in drawn]
    params = [SamplingParams(max_new_tokens=40, seed=n, temperature=3.0, guide=g) for n, g in enumerate(guides)]
    for pattern, answer in zip(drawn, engine.generate(["say"] * 4, params), strict=True):
        if answer.finish_reason == "stop":
            assert re.fullmatch(pattern, answer.text), (pattern, answer.text)


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("(", "not a regular expression"),
        ("a(?=b)", "look-ahead"),
        ("(?<!a)b", "look-behind"),
        (r"(a)\1", "back-references"),
        ("a++", "possessive"),
        (r"a\b", "is not supported"),
        ("a$|b", "$ inside"),
        ("(a)?(?(1)a|b)", "(?("),
        ("(?P<n>a)(?P=n)", "(?P="),
    ],
)
def test_an_expression_that_cannot_be_had_is_named(pattern, says):
    with pytest.raises(RegexError, match=re.escape(says)):
        respelled(pattern)


# ------------------------------------------------------------------------------------------- choices


def test_an_answer_is_one_of_the_choices(engine, maker):
    texts = ["yes", "no", "no!", 'é"\\\n', "🙂"]
    constraint = Constraint("choice", json.dumps(texts))
    found = answers(engine, [maker.guide(constraint) for _ in range(24)])
    assert len(found) == 24 and set(found) <= set(texts) and len(set(found)) > 2


# ------------------------------------------------------------------------------------------ grammars

SUM = {
    "gbnf": 'root ::= term (" + " term)*\nterm ::= num | "(" root ")"\nnum ::= [0-9]{1,3}  # few digits\n',
    "lark": 'start: term (" + " term)*\nterm: NUM | "(" start ")"\nNUM: /[0-9]{1,3}/\n',
}


def reads_sum(text):
    """Whether a text is such a sum: the innermost parentheses are numbers too, until nothing is left to fold."""
    while (folded := re.sub(r"\([0-9]{1,3}( \+ [0-9]{1,3})*\)", "1", text)) != text:
        text = folded
    return re.fullmatch(r"[0-9]{1,3}( \+ [0-9]{1,3})*", text) is not None


@pytest.mark.slow
@pytest.mark.parametrize("form", SUM)
def test_an_answer_is_of_the_grammar(engine, maker, form):
    found = answers(engine, [maker.guide(Constraint("grammar", SUM[form])) for _ in range(40)])
    assert len(found) > 10 and all(map(reads_sum, found)), found
    assert any("(" in text for text in found) and any("+" in text for text in found)


def test_what_a_reader_of_sums_can_tell():
    assert reads_sum("1 + (2 + (33))") and not any(map(reads_sum, ["", "1 +", "(1", "1)", "1234", "1+2"]))


@pytest.mark.parametrize(
    ("grammar", "says"),
    [
        ("root ::= foo", "foo"),
        ('x ::= "a"', "root"),
        ("root ::= " + "(" * 3000 + '"a"' + ")" * 3000, "nested too deeply"),
        ("start: foo", "foo"),
        ("start: /(?=a)/", "."),
        ("no grammar", "."),
        ("root ::= " + "".join(f'"{n}" r{n}\nr{n} ::= ' for n in range(4000)) + '"z"', "."),
    ],
)
def test_a_grammar_that_is_none_is_one_line(maker, grammar, says):
    with pytest.raises(GuideError, match=says) as caught:
        maker.guide(Constraint("grammar", grammar))
    assert "\n" not in str(caught.value)


def test_json_without_white_space(engine, maker):
    constraint = Constraint("json", '{"type":"array","items":{"enum":[1,2]},"maxItems":3}', compact=True)
    found = answers(engine, [maker.guide(constraint) for _ in range(8)])
    assert found and all(re.fullmatch(r"\[([12](,[12])*)?\]", text) for text in found)
