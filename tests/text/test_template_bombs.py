"""A chat template is a program of whoever made the checkpoint: bounded in time and memory, whatever it does."""

import json
import os
import resource
import signal
import threading
import time
from pathlib import Path

import pytest

from gpt_fast.text.chat import ChatTemplate, ChatTemplateError
from gpt_fast.text.template_process import SECONDS
from gpt_fast.text.template_renderer import Renderer, TemplateError

USER = [{"role": "user", "content": "hi"}]
GROW = "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"
MACRO = "{% macro d(x) %}{{ x }}{{ x }}{% endmacro %}"
BOMBS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "loops that speak": "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
    "range": "{{ range(10 ** 12) | list | length }}",
    "repeated string": "{{ ('x' * 10 ** 10) | length }}",
    "repeated list": "{{ ([1] * 10 ** 10) | length }}",
    "doubled string": GROW,
    "macros": MACRO + "{{ " + "d(" * 40 + "'x'" + ")" * 40 + " | length }}",
    "endless macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "padding": "{{ 'x' | center(10 ** 10) }}",
    "padding by the string": "{{ 'x'.ljust(10 ** 10) | length }}",
    "format": "{{ '%10000000000d' % 1 }}",
    "format by the string": "{{ '{:10000000000}'.format(1) | length }}",
    "indented JSON": "{{ messages | tojson(indent=10 ** 10) }}",
    "power, for some": "{% if messages[0].content == 'hi' %}{{ 3 ** (messages | length * 10 ** 9) }}{% endif %}",
}


@pytest.fixture(scope="module")
def renderer():
    return Renderer()


def render(renderer: Renderer, source: str) -> str:
    return renderer.render(source, {"messages": USER}, max_chars=1 << 20)


@pytest.mark.slow  # each may take all the time it has
@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_one_line(renderer, name):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with pytest.raises(TemplateError, match=r"^[^\n]{3,200}$"):
        render(renderer, BOMBS[name])
    assert render(renderer, "{{ messages[0].content }}") == "hi"  # and the next one is answered
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert used.ru_utime - before.ru_utime < SECONDS + 5  # of processor time: no bomb goes on behind its answer
    # KiB; of the largest child that this process ever had, another test's perhaps
    assert used.ru_maxrss <= max(before.ru_maxrss, 1 << 20)


@pytest.mark.slow
def test_one_that_is_refused_at_once_is_refused_by_the_checkpoints_loading(renderer):
    with pytest.raises(ChatTemplateError, match=r"^chat template: takes too (long|much) \(allowed [^\n]+\)$"):
        ChatTemplate("{{ 10**100000000 }}")


def test_a_process_that_ends_between_two_renderings_is_started_again(renderer):
    assert render(renderer, "{{ messages[0].role }}") == "user"
    first = renderer._worker.process
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert render(renderer, "{{ messages[0].role }}") == "user"


def test_a_process_that_ends_during_a_rendering_is_an_error(renderer):
    render(renderer, "x")
    os.kill(renderer._worker.process.pid, signal.SIGSTOP)  # it has got the request and does not answer
    process = renderer._worker.process
    threading.Timer(0.3, process.kill).start()
    with pytest.raises(TemplateError, match="takes too much"):
        render(renderer, "x")
    assert render(renderer, "x") == "x"


def test_it_leaves_no_file_and_ends_with_its_caller(renderer):
    render(renderer, "x")
    process = renderer._worker.process
    limits = {line.split("  ")[0]: line for line in Path(f"/proc/{process.pid}/limits").read_text().splitlines()}
    assert "unlimited" not in limits["Max address space"] and " 0 " in limits["Max file size"]
    renderer._worker.connection.close()
    assert process.wait(timeout=10) == 0


def test_what_json_carries_arrives_whole(renderer):
    odd = ["\ud800 \x00 \x1f\n\r\u2028 \ufdd0 😀", 10**30, 1e-300, None, True, {"": []}]
    got = renderer.render("{{ odd | tojson }}", {"odd": odd}, max_chars=1000)
    assert json.loads(got) == odd


def test_time_is_counted_anew_for_each_rendering(renderer):
    work = "{% for a in range(90000) %}{% for b in range(20) %}{% endfor %}{% endfor %}x"
    started = time.process_time()
    for _ in range(3):
        assert render(renderer, work) == "x"
    assert time.process_time() - started < 60
