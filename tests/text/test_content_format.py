"""A template gets a message's content in the form that it walks over; no text is dropped."""

import zipfile
from typing import Any

import pytest
from test_chat import COMMITTED, IN_TRL, SPECIAL_TOKENS, source_of, transformers_renders

from gpt_fast.text.chat import ChatTemplate, CompiledTemplate
from support.hard_strings import TRL, download

# Shapes of published templates, cut down to how they take content.
STRING = {
    "plain": "{% for m in messages %}{{ m['content'] }};{% endfor %}",
    "sliced loop": "{% for m in messages[1:] %}{{ m.content | trim }}{% endfor %}",
    "other loop": "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls %}{{ c }}{% endfor %}{% endfor %}",
    "split": "{% for m in messages %}{% set c = m.content.split('</think>')[-1] %}{{ c }}{% endfor %}",
    "a macro": (
        "{% macro said(content) %}{% if content is string %}{{ content }}{% else %}{% for c in content %}{{ c.text }}"
        "{% endfor %}{% endif %}{% endmacro %}{% for m in messages %}{{ said(m.content) }}{% endfor %}"
    ),
    "letters": "{% for m in messages %}{{ m.content | join('') }}{% endfor %}",
    "only with a system message": (
        "{{ raise_exception('no') if messages[0].role != 'system' }}{{ messages[1].content }}"
    ),
    "other words": "{% for content in documents or [] %}{{ content.text }}{% endfor %}{{ messages[0].content }}",
}
PARTS = {
    "llama guard 3": (
        "{% for message in messages %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
        "{{ message['role'].title() + ': ' + content['text'] | trim + '\n\n' }}{% endfor %}{% endfor %}"
    ),
    "joined": (
        "{% for message in messages %}{{ message.content | selectattr('type', 'equalto', 'text')"
        " | map(attribute='text') | join(' ') }}{% endfor %}"
    ),
    "loop": "{% for m in messages %}{% for c in m.content if c.type == 'text' %}{{ c.text }}{% endfor %}{% endfor %}",
    "a variable": (
        "{% for m in messages %}{% set parts = m['content'] %}{% for c in parts %}{{ c.text }}{% endfor %}{% endfor %}"
    ),
    "other messages": (
        "{% set rest = messages[1:] if messages[0].role == 'system' else messages %}"
        "{% for m in rest %}{% for c in m.content %}{{ c['text'] }}{% endfor %}{% endfor %}"
    ),
    "first of all": "{{ messages[0]['content'][0]['text'] }}",
    "a macro": (
        "{% macro said(content) %}{% for c in content %}{{ c.text }}{% endfor %}{% endmacro %}"
        "{% for m in messages %}{{ said(m.content) }}{% endfor %}"
    ),
    "a namespace": (
        "{% set ns = namespace(c='') %}{% for m in messages %}{% set ns.c = m.content %}"
        "{% for c in ns.c %}{{ c.text }}{% endfor %}{% endfor %}"
    ),
    "get": "{% for m in messages %}{% for c in m.get('content') %}{{ c['text'] }}{% endfor %}{% endfor %}",
    "the last": "{% set m = messages | last %}{% for c in m.content %}{{ c.text }}{% endfor %}",
    "items": (
        "{% for m in messages %}{% for key, value in m.items() if key == 'content' %}"
        "{% for c in value %}{{ c.text }}{% endfor %}{% endfor %}{% endfor %}"
    ),
    "one message": "{% set m = messages[-1] %}{% for c in m.content %}{{ c.text }}{% endfor %}",
}
BOTH = {
    "llama 4": (
        "{% for message in messages %}{% if message['content'] is string %}{{ message['content'] | trim }}{% else %}"
        "{% for content in message['content'] %}{% if content['type'] == 'image' %}<|image|>"
        "{% elif content['type'] == 'text' %}{{ content['text'] | trim }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
    )
}
CASES = {
    name: (source, form)
    for form, group in (("string", STRING), ("parts", PARTS), ("both", BOTH))
    for name, source in group.items()
}


@pytest.mark.parametrize("name", CASES)
def test_the_templates_syntax_says_its_form(name: str) -> None:
    source, form = CASES[name]
    assert CompiledTemplate(source).content_format == form


@pytest.mark.model
@pytest.mark.parametrize("name", [*COMMITTED, *IN_TRL])
def test_published_text_templates_take_strings(name: str) -> None:
    assert CompiledTemplate(source_of(name)).content_format == "string"


@pytest.mark.model
@pytest.mark.parametrize("form", ["string", "parts"])
def test_no_published_template_drops_a_users_text(form: str) -> None:
    """All of TRL's, those for pictures too: the text is in the prompt, in whichever form it was sent."""
    wheel = zipfile.ZipFile(download(TRL))
    names = [name for name in wheel.namelist() if name.endswith(".jinja")]
    assert len(names) > 60
    content = "vermilion" if form == "string" else text_parts("ver", "milion")
    for name in names:
        rendered = ChatTemplate(wheel.read(name).decode(), special_tokens=SPECIAL_TOKENS).render(
            [{"role": "user", "content": content}]
        )
        assert rendered.count("vermilion") == 1 or (rendered.count("ver") == 1 and "milion" in rendered), name


def text_parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


@pytest.mark.parametrize("name", CASES)
def test_strings_and_parts_render_as_transformers_with_the_right_form(name: str) -> None:
    source, form = CASES[name]

    def conversation(*contents: Any) -> list[dict[str, Any]]:
        roles = ("system", "user", "assistant")
        return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]

    strings = conversation(" be brief", "one", "two ")
    parts = conversation(text_parts(" be brief"), text_parts("o", "ne"), text_parts("two "))
    as_parts = conversation(text_parts(" be brief"), text_parts("one"), text_parts("two "))
    wanted = {"string": (strings, strings), "parts": (as_parts, parts), "both": (strings, parts)}[form]
    for given, want in zip((strings, parts), wanted, strict=True):
        rendered = transformers_renders(source, want, None, True)
        assert rendered and ChatTemplate(source).render(given) == rendered
