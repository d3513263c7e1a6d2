"""A line is a request of OpenAI's batch files or a body alone; what is neither says why, under its own custom_id."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt_fast.batch.lines import LineError, Names, answer_line, error_line, failed, parse_line
from support.examples import examples

CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
NAMES = Names("ab" * 32, 7)


def whole(**changes):
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": CHAT}
    return json.dumps({k: v for k, v in {**line, **changes}.items() if v is not ...})


def test_the_forms_of_a_line():
    assert parse_line(whole(), 7, {}).path == "v1/chat/completions"
    assert parse_line(whole(url="/v1/completions"), 7, {}).path == "v1/completions"
    assert parse_line(json.dumps(CHAT), 7, {}).path == "v1/chat/completions"
    bare = parse_line('{"prompt": "x", "custom_id": "b"}', 7, {})
    assert (bare.custom_id, bare.path, bare.body) == ("b", "v1/completions", {"prompt": "x"})
    assert parse_line('{"prompt": "x"}', 7, {}).custom_id == "line-7"


def test_defaults_are_for_bodies_that_do_not_say():
    defaults = {"max_tokens": 5, "temperature": 0}
    assert parse_line('{"prompt": "x", "max_tokens": 9}', 1, defaults).body == {
        "prompt": "x", "max_tokens": 9, "temperature": 0,
    }  # fmt: skip
    with pytest.raises(LineError, match="stream: not in a batch"):
        parse_line('{"prompt": "x"}', 1, {"stream": True})


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        ("{", "invalid_json_line", "not JSON at character 1 (allowed one JSON object)"),
        ("[]", "invalid_json_line", "must be a JSON object (got an array)"),
        ("\udcff", "invalid_json_line", "not UTF-8 (allowed one JSON object a line)"),
        ('{"prompt": "' + "x" * (1 << 20) + '"}', "invalid_json_line", "1048590 bytes (allowed 1048576)"),
        ("{}", "invalid_line", "url and body are required, or prompt, or messages"),
        (whole(method="GET"), "invalid_method", 'method: not for a batch (got "GET", allowed POST)'),
        (whole(url="/v1/embeddings"), "invalid_url", 'url: not for a batch (got "/v1/embeddings", allowed '),
        (whole(url=...), "invalid_url", "url: not for a batch (got null, allowed "),
        (whole(body=[1]), "invalid_body", "body: must be an object (got [1])"),
        (whole(bodies={}), "invalid_line", "bodies: unknown field (allowed custom_id, method, url, body)"),
        (whole(body={**CHAT, "stream": True}), "invalid_body", "stream: not in a batch (got true, leave it out)"),
        (whole(body={**CHAT, "timeout": 3}), "invalid_body", "timeout: not in a batch (got 3, leave it out)"),
        (whole(custom_id=3), "invalid_custom_id", "custom_id: is no name (got 3, allowed a string of 1..512 char"),
    ],
)
def test_what_is_no_request_says_why(text, code, message):
    with pytest.raises(LineError) as caught:
        parse_line(text, 7, {})
    told = json.loads(error_line(NAMES, caught.value))
    assert told["error"]["code"] == code
    assert told["error"]["message"].startswith(f"line 7: {message}")
    assert told["response"] is None
    known = '"custom_id": "a"' in text
    assert told["custom_id"] == ("a" if known else "line-7")


@given(st.text(), st.dictionaries(st.text(), st.text()))
@examples(50)
def test_an_answer_line_is_one_line_of_openais_form(custom_id, body):
    line = answer_line(NAMES, custom_id, status=200, body=json.dumps(body))
    assert len(line.splitlines()) == 1 or "\n" not in line
    told = json.loads(line)
    assert told.keys() == {"id", "custom_id", "response", "error"}
    assert told["response"] == {"status_code": 200, "request_id": told["response"]["request_id"], "body": body}
    assert (told["custom_id"], told["error"]) == (custom_id, None)
    assert not failed(line)
    assert failed(answer_line(NAMES, custom_id, status=400, body="{}"))


def test_names_and_seeds_are_of_the_line_and_nothing_else():
    again, other, elsewhere = Names("ab" * 32, 7), Names("ab" * 32, 8), Names("cd" * 32, 7)
    assert (again.stem, again.seed(0)) == (NAMES.stem, NAMES.seed(0))
    assert len({NAMES.stem, other.stem, elsewhere.stem}) == 3
    assert len({NAMES.seed(0), NAMES.seed(1), other.seed(0)}) == 3
