"""Any bytes, to any path: an answer, or a refusal that a client can read."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt_fast.serve.admission import AT_ONCE, Admit, Limits
from gpt_fast.serve.endpoints import ENDPOINTS
from gpt_fast.serve.exchange import Incoming, Job, Refusal, Reply
from gpt_fast.text.grammar_check import Checked
from support.examples import examples
from support.mutations import corpus, mutated
from support.paths import ROOT
from support.tiny_engine import tiny_engine

CLIENTS = json.loads((ROOT / "tests/serve/client_bodies.json").read_text())
SEEDS = [json.dumps(each["body"]).encode() for each in CLIENTS] + corpus("requests")
PATHS = [*ENDPOINTS, *AT_ONCE, "tokenizer_info", "v1/models/x", "chat"]
INNER = re.compile(r"Traceback|0x[0-9a-f]{6,}|\.py\b|/work|/home|site-packages|gpt_fast\.|<class|object at")


@pytest.fixture(autouse=True, scope="module")
def no_other_process():
    """Compiling is bounded by a process of its own, a tenth of a second each; see tests/text/test_schema_bombs.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gpt_fast.text.grammar.check", lambda grammar, *, gbnf=False: Checked("not compiled here", ""))
        yield


@pytest.fixture(scope="module")
def admit() -> Admit:
    limits = Limits(max_new_tokens=20, stream=True, max_waiting=4, max_seconds=60.0)
    return Admit(tiny_engine(), in_flight=lambda: 0, limits=limits, model_names=["gpt-fast"], draining=lambda: False)


@examples(400)
@given(path=st.sampled_from(PATHS), body=mutated(SEEDS))
def test_any_bytes_are_answered_or_refused(admit, path, body):
    try:
        answer = admit(Incoming(path, body))
    except Refusal as refused:
        assert 400 <= refused.reply.status < 500
        message = json.loads(refused.reply.text)["error"]["message"]
        assert message and len(message) < 2000 and not INNER.search(message.replace(body.decode(errors="replace"), ""))
    else:
        assert isinstance(answer, Job | Reply)
