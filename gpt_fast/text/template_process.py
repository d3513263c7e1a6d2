"""Compiles and renders chat templates, in a process that may end at any time: template_renderer.py is its caller.

A template is a program of whoever made the checkpoint. Jinja's sandbox keeps it from our files and from the network,
not from computing 10**100000000; nothing but the kernel stops that. So the kernel gives this process so much processor
time for each rendering, and so much memory, and ends it where that is not enough.

A line of JSON comes in, a line goes out: {"source"} -> {"content_format"}; with "variables" and "max_chars" besides ->
{"text"}; or {"error"}, in one line.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
import signal
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import jinja2

SECONDS = 2.0  # of processor time a rendering, which takes 0.1 ms, and 0.3 s for 50,000 messages
MEMORY = 1 << 29  # bytes of address space
OPEN, CLOSE = "\ufdd0", "\ufdd1"  # see chat.py: they must survive ensure_ascii


class Refused(Exception):
    """What a template raises itself, or that its text is too long."""


class Compiled(NamedTuple):
    template: jinja2.Template
    content_format: str


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the caller's: it closes our input when it ends
    compiled("")  # whatever Jinja imports at its first use
    limit_memory()
    with open(0, "rb", buffering=1 << 20) as lines, open(1, "wb") as replies:
        for line in lines:
            signal.setitimer(signal.ITIMER_PROF, SECONDS)  # SIGPROF then ends us, within C code too
            reply = json.dumps(answer(json.loads(line)), ensure_ascii=False).encode("utf-8", "surrogatepass")
            signal.setitimer(signal.ITIMER_PROF, 0)
            replies.write(reply + b"\n")
            replies.flush()


def limit_memory() -> None:
    """Of this process, from now on; nor does it leave a file behind."""
    import resource

    if sys.platform == "linux":  # macOS has the limit, and refuses to set it
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def answer(request: Mapping[str, Any]) -> dict[str, str]:
    try:
        template, content_format = compiled(request["source"])
        if "variables" not in request:
            return {"content_format": content_format}
        return {"text": joined(template.generate(request["variables"]), request["max_chars"])}
    except Exception as error:  # a template is a program: it may raise anything
        message = re.sub(r" at 0x[0-9a-fA-F]+", "", str(error))  # an object's address is nobody's business
        return {"error": " ".join(message.split()) or type(error).__name__}


def joined(chunks: Iterable[str], max_chars: int) -> str:
    text: list[str] = []
    room = max_chars
    for chunk in chunks:
        room -= len(chunk)
        if room < 0:
            raise Refused(f"more than {max_chars} characters")
        text.append(chunk)
    return "".join(text)


# ------------------------------------------------------------------- Jinja, as transformers sets it up
# huggingface/transformers, utils/chat_template_utils.py


@functools.lru_cache(maxsize=16)
def compiled(source: str) -> Compiled:
    from gpt_fast.text.content_format import content_format

    jinja = environment()
    return Compiled(jinja.from_string(source), content_format(jinja.parse(source)))


@functools.cache
def environment() -> jinja2.Environment:
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %}...{% endgeneration %} marks what a model wrote, for training; here it is its contents."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    made.filters["tojson"] = to_json
    made.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return made


def raise_exception(message: str) -> None:
    raise Refused(str(message))


def strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML; this one does not. Where ASCII is asked for, marks are kept all the same."""
    text = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
    return re.sub(f"[^\0-~{OPEN}{CLOSE}]", lambda c: json.dumps(c[0])[1:-1], text) if ensure_ascii else text


if __name__ == "__main__":
    main()
