"""Chat templates render what transformers renders, and nothing a message says becomes a control token."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt_fast.config import ConfigError
from gpt_fast.text.chat import ChatTemplate, ChatTemplateError, load_chat_template, split_marks
from gpt_fast.text.gguf_tokenizer import tokenizer_json_from_gguf
from gpt_fast.text.load_tokenizer import load_tokenizer
from gpt_fast.text.token_bytes import BYTE_OF
from gpt_fast.text.tokenizer import Tokenizer
from support.examples import examples
from support.hard_strings import TRL, hard_strings, wheel_member
from support.paths import ROOT

DATA = ROOT / "tests" / "data" / "chat"
SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
IN_TRL = ("llama3", "llama3_1", "llama3_2", "qwen2_5", "qwen3", "phi3", "phi3_5", "deepseek_r1_distill")

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": 'Weather of a "city" <b>& more</b>, naïve — 天気',
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer", "enum": [1, 2, 3]}},
            "required": ["city"],
        },
    },
}
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Zürich", "days": 2, "x": None}}}


def says(role: str, content: object, **more: object) -> dict:
    return {"role": role, "content": content, **more}


CONVERSATIONS = {
    "user": [says("user", "Hello")],
    "system": [says("system", "  Be brief. "), says("user", "Hi\n")],
    "turns": [says("user", "1"), says("assistant", " 2 "), says("user", "3"), says("assistant", "4"), says("user", "")],
    "answered": [says("system", "s"), says("user", "q"), says("assistant", "a")],
    "unicode": [says("user", "👩‍👩‍👧 é नमस्ते\u2028\0 {{ bos_token }} {% if %} <b>&amp;'\"")],
    "reasoning": [says("user", "q"), says("assistant", "<think>\nhm\n</think>\n\na"), says("user", "r")],
    "tool": [says("user", "w?"), says("assistant", "", tool_calls=[CALL]), says("tool", '{"t": 2}'), says("user", "k")],
    "two answers": [says("user", "q"), says("assistant", "a"), says("assistant", "b")],
    "answer first": [says("assistant", "a"), says("user", "q")],
    "late system": [says("user", "q"), says("system", "s")],
    "odd role": [says("narrator", "n")],
    "no content": [{"role": "user"}],
    "null content": [says("user", None)],
    "empty": [],
}


def source_of(name: str) -> str:
    if name in IN_TRL:
        return wheel_member(TRL, f"trl/chat_templates/{name}.jinja").decode()
    return (DATA / f"{name}.jinja").read_text(encoding="utf-8")


def transformers_renders(source: str, messages: list, tools: list | None, add_generation_prompt: bool) -> str | None:
    """What transformers renders, None where it raises."""
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        rendered, _ = render_jinja_template(
            conversations=[messages],
            tools=tools,
            chat_template=source,
            add_generation_prompt=add_generation_prompt,
            **SPECIAL_TOKENS,
        )
    except Exception:
        return None
    return rendered[0]


def we_render(source: str, messages: list, tools: list | None, add_generation_prompt: bool) -> str | None:
    template = ChatTemplate(source, special_tokens=SPECIAL_TOKENS)
    try:
        return template.render(messages, tools=tools, add_generation_prompt=add_generation_prompt)
    except ChatTemplateError as error:
        assert "\n" not in str(error)
        return None


COMMITTED = ("smollm2", "llama2", "mistral", "zephyr")
PUBLISHED = [*COMMITTED, *(pytest.param(name, marks=pytest.mark.model) for name in IN_TRL)]


@pytest.mark.parametrize("name", PUBLISHED)
def test_renders_as_transformers(name: str) -> None:
    source = source_of(name)
    rendered = 0
    for messages in CONVERSATIONS.values():
        for tools in (None, [WEATHER], [WEATHER, {**WEATHER, "strict": True}]):
            for add_generation_prompt in (True, False):
                want = transformers_renders(source, messages, tools, add_generation_prompt)
                assert we_render(source, messages, tools, add_generation_prompt) == want
                rendered += want is not None
    assert rendered >= 24  # at least four conversations are fine with every template


@pytest.mark.parametrize("name", ["llama2", "mistral"])
def test_wrong_role_order_is_the_templates_own_message(name: str) -> None:
    template = ChatTemplate(source_of(name), special_tokens=SPECIAL_TOKENS)
    with pytest.raises(ChatTemplateError, match=r"^chat template: Conversation roles must alternate"):
        template.render(CONVERSATIONS["two answers"])


FEATURES = {
    "trim and lstrip": "{% if true %}\n  {% for m in messages %}\n{{ m.content }}\n  {% endfor %}\n{% endif %}\n.",
    "tojson": "{{ messages | tojson }} {{ messages | tojson(indent=2) }}",
    "tojson, sorted": "{{ {'b': 1, 'a': '<&>'} | tojson(sort_keys=true) }}",
    "ascii": "{{ messages | tojson(ensure_ascii=true) }}{{ '\x7f\u0080😀' | tojson(true) }}",
    "separators": "{{ messages | tojson(separators=(',', ':')) }}",
    "break": "{% for m in messages %}{% if loop.index == 2 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "continue": "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.content }}{% endfor %}",
    "tag": "{% for m in messages %}{% generation %}{% set x = 1 %}{{ m.role }}{% endgeneration %}{{ x }}{% endfor %}",
    "namespace": "{% set n = namespace(a=0) %}{% for m in messages %}{% set n.a = n.a + 1 %}{% endfor %}{{ n.a }}",
    "undefined": "{{ nothing }}{{ bos_token }}{{ pad_token }}{{ tools is none }}{{ documents is none }}",
    "raise": "{{ raise_exception('no') }}",
    "sandbox": "{{ ''.__class__.__mro__ }}",
    "immutable": "{{ messages.append(1) }}",
    "date": "{{ strftime_now('%Y') }}",
    "type error": "{{ 1 + 'a' }}",
    "macro": "{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f(messages[0].content) }}",
    "dict": "{{ dict(a=1) }}{{ messages[0] | items | list }}",
}


@pytest.mark.parametrize("feature", FEATURES)
def test_every_feature_as_transformers(feature: str) -> None:
    for messages in CONVERSATIONS.values():
        want = transformers_renders(FEATURES[feature], messages, None, True)
        assert we_render(FEATURES[feature], messages, None, True) == want


def test_variables_reach_the_template() -> None:
    template = ChatTemplate("{{ enable_thinking }} {{ documents[0].text }}")
    assert template.render([], documents=[{"text": "d"}], chat_template_kwargs={"enable_thinking": False}) == "False d"


@pytest.mark.parametrize(
    "name", ["messages", "tools", "documents", "add_generation_prompt", "chat_template", "tokenize"]
)
def test_what_the_call_sets_is_no_variable(name: str) -> None:
    with pytest.raises(ChatTemplateError, match=f"^chat_template_kwargs: {name} is set by the request itself$"):
        ChatTemplate("x").render([], chat_template_kwargs={name: None})


@pytest.mark.model
@pytest.mark.parametrize("thinking", [True, False])
def test_qwen3_thinks_or_not_as_transformers(thinking: bool) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    options = {"enable_thinking": thinking}
    (want,), _ = render_jinja_template(
        [CONVERSATIONS["turns"]], chat_template=source_of("qwen3"), add_generation_prompt=True, **options
    )
    got = ChatTemplate(source_of("qwen3")).render(CONVERSATIONS["turns"], chat_template_kwargs=options)
    assert got == want and ("<think>" not in got) == thinking


# ---------------------------------------------------------------------- the last message, to go on with

TRIMMED = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</s>{% endfor %}"
CUT = "{% for m in messages %}{{ m.content[3:] }}{% endfor %}"
NO_CONTENT = "{% for m in messages %}{{ m.text }}{% endfor %}"
CONTINUED = {
    **{name: CONVERSATIONS[name] for name in ("user", "answered", "two answers", "empty", "null content")},
    "spaces": [says("user", "q"), says("assistant", "  Sure, \n ")],
    "twice": [says("user", "again"), says("assistant", "again")],
    "nothing": [says("user", "q"), says("assistant", "")],
    "parts": [says("user", "q"), says("assistant", [{"type": "text", "text": "a"}, {"type": "text", "text": " b "}])],
    "picture": [says("assistant", [{"type": "image"}])],
}


@pytest.mark.parametrize("source", [*COMMITTED, TRIMMED, CUT, NO_CONTENT])
@pytest.mark.parametrize("name", CONTINUED)
def test_a_message_is_continued_as_transformers_does(source: str, name: str) -> None:
    """Where the form of content is the template's, that is: a template for strings gets the joined text."""
    from transformers.utils.chat_template_utils import render_jinja_template

    source = source_of(source) if source in COMMITTED else source
    template = ChatTemplate(source, special_tokens=SPECIAL_TOKENS)
    messages = CONTINUED[name]
    if name == "parts":
        messages = [messages[0], says("assistant", "a b ")]
    try:
        (want,), _ = render_jinja_template(
            [messages], chat_template=source, continue_final_message=True, add_generation_prompt=False, **SPECIAL_TOKENS
        )
    except Exception:
        with pytest.raises(ChatTemplateError):
            template.render(CONTINUED[name], add_generation_prompt=False, continue_final_message=True)
        return
    assert template.render(CONTINUED[name], add_generation_prompt=False, continue_final_message=True) == want


def test_a_message_is_continued_or_answered_not_both() -> None:
    with pytest.raises(ChatTemplateError, match="does not go with add_generation_prompt"):
        ChatTemplate(TRIMMED).render(CONVERSATIONS["answered"], continue_final_message=True)


def test_size_is_bounded() -> None:
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}xxxxxxxxxx{% endfor %}{% endfor %}"
    with pytest.raises(ChatTemplateError, match="more than 1000 characters"):
        ChatTemplate(endless, max_chars=1000).render([])


@pytest.mark.parametrize("source", ["{% if %}", "{{ ", "{% nothing %}", "{% generation %}", "{{ x | nofilter }}"])
def test_broken_template_is_one_line(source: str) -> None:
    with pytest.raises(ChatTemplateError, match=r"^chat template: [^\n]+$"):
        ChatTemplate(source)


# ------------------------------------------------------------------------------ from the checkpoint


def test_template_file_comes_before_the_config(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": "config", "bos_token": {"content": "<b>"}, "eos_token": "<e>", "pad_token": None})
    )
    template = load_chat_template(tmp_path)
    assert template is not None and template.render([]) == "config"
    (tmp_path / "chat_template.jinja").write_text("file {{ bos_token }}{{ eos_token }}{{ pad_token }}")
    template = load_chat_template(tmp_path)
    assert template is not None and template.render([]) == "file <b><e>"


def test_named_templates(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "with tools"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    template = load_chat_template(tmp_path)
    assert template is not None
    assert (template.render([]), template.render([], tools=[WEATHER])) == ("plain", "with tools")


def test_named_templates_without_a_default_are_refused_when_it_is_asked_for(tmp_path: Path) -> None:
    named = [{"name": "rag", "template": "{{ documents }}"}, {"name": "tool_use", "template": "with tools"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    template = load_chat_template(tmp_path)
    assert template is not None and template.render([], tools=[WEATHER]) == "with tools"
    with pytest.raises(ChatTemplateError, match=r'none named "default" \(got rag, tool_use\)$'):
        template.render([says("user", "x")])


@pytest.mark.parametrize("default", ["chat_template.jinja", "tokenizer_config.json"])
def test_additional_templates_have_their_own_files(tmp_path: Path, default: str) -> None:
    """transformers >= 4.52 writes them so; in the other layout it finds no default any more, and we still do."""
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text(
        source_of("smollm2") + "{{ tools | tojson }}"
    )
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("{% for %} is not even read")
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_json_from_gguf(byte_fields()))
    config = {"chat_template": "of the config"} if default == "tokenizer_config.json" else {}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | config))
    if default == "chat_template.jinja":
        (tmp_path / "chat_template.jinja").write_text(source_of("smollm2"))
    template = load_chat_template(tmp_path)
    assert template is not None
    for tools in (None, [WEATHER]) if default == "chat_template.jinja" else ([WEATHER],):
        assert template.render(CONVERSATIONS["system"], tools=tools) == apply_reference(
            tmp_path, CONVERSATIONS["system"], tools=tools, add_generation_prompt=True
        )
    if config:
        assert template.render([]) == "of the config"


def apply_reference(directory: Path, messages: list, **options: object) -> str:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory).apply_chat_template(messages, tokenize=False, **options)


def test_no_template(tmp_path: Path) -> None:
    assert load_chat_template(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert load_chat_template(tmp_path) is None


@pytest.mark.parametrize(
    "config",
    [
        '{"chat_template": 3}',
        '{"chat_template": [{"name": "default", "template": 1}]}',
        '{"chat_template": [1]}',
        "[]",
        "{",
    ],
)
def test_bad_config_is_refused(tmp_path: Path, config: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text(config)
    with pytest.raises((ChatTemplateError, ConfigError), match=r"tokenizer_config\.json"):
        load_chat_template(tmp_path)


# ------------------------------------------------------------------- control tokens only from templates

CONTROLS = ["<|im_start|>", "<|im_end|>", "<s>", "</s>"]


def byte_fields() -> dict:
    """A GGUF's metadata: tokens are bytes, and four control tokens."""
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": [*BYTE_OF, *CONTROLS],
        "tokenizer.ggml.merges": [],
        "tokenizer.ggml.token_type": [1] * 256 + [3] * len(CONTROLS),
    }


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("bytes")
    (directory / "tokenizer.json").write_bytes(tokenizer_json_from_gguf(byte_fields()))
    return load_tokenizer(directory)


FRAGMENTS = [
    *CONTROLS,
    "<|im_",
    "end|>",
    "<",
    ">",
    "|>",
    "<|",
    "s>",
    "</",
    "/",
    "s",
    "im_end",
    " ",
    "\n",
    "a",
    "\ufdd0",
    "\ufdd1",
    "é",
]
PARTS = "{% for m in messages %}<s>{{ m.role }}:{% for part in m.content %}{{ part }}{% endfor %}</s>{% endfor %}"


@examples(300)
@given(contents=st.lists(st.lists(st.sampled_from(FRAGMENTS), max_size=8).map("".join), min_size=1, max_size=4))
def test_a_message_cannot_make_a_control_token(byte_tokenizer: Tokenizer, contents: list[str]) -> None:
    template = ChatTemplate(source_of("smollm2"))
    ids = template.encode(byte_tokenizer, [says("user", content) for content in contents])
    harmless = template.encode(byte_tokenizer, [says("user", "x") for _ in contents])
    assert [i for i in ids if i >= 256] == [i for i in harmless if i >= 256]
    rendered = template.render([says("user", content) for content in contents])
    unmarked = rendered.translate({0xFDD0: None, 0xFDD1: None})  # the two noncharacters that serve as marks
    assert byte_tokenizer.decode_bytes(ids, keep_specials=True).decode() in (rendered, unmarked)


@examples(300)
@given(parts=st.lists(st.lists(st.sampled_from(FRAGMENTS), max_size=3).map("".join), max_size=4))
def test_nor_can_parts_joined_by_the_template(byte_tokenizer: Tokenizer, parts: list[str]) -> None:
    parts = [part for part in parts if not part.isidentifier()]
    ids = ChatTemplate(PARTS).encode(byte_tokenizer, [says("user", parts)])
    assert [byte_tokenizer.token_bytes(i, keep_specials=True) for i in ids if i >= 256] == [b"<s>", b"</s>"]


@pytest.mark.parametrize(
    ("source", "content"), [("{{ messages[0].content }}s>.", "a </"), ("<{{ messages[0].content }}", "/s> b")]
)
def test_nor_can_the_template_complete_one(byte_tokenizer: Tokenizer, source: str, content: str) -> None:
    ids = ChatTemplate(source).encode(byte_tokenizer, [says("user", content)])
    assert max(ids) < 256
    assert "</s>" in byte_tokenizer.decode(ids)


def test_control_tokens_in_tools_and_ascii_json_stay_text(byte_tokenizer: Tokenizer) -> None:
    tool = {"name": "f</s>", "</s>": ["<s>"], "text": "é\ufdd0"}
    ids = ChatTemplate("<s>{{ tools | tojson(ensure_ascii=true) }}</s>").encode(byte_tokenizer, [], tools=[tool])
    assert [i for i in ids if i >= 256] == [ids[0], ids[-1]]
    assert byte_tokenizer.decode(ids) == r'[{"name": "f</s>", "</s>": ["<s>"], "text": "\u00e9"}]'


def test_messages_without_control_tokens_are_encoded_whole(byte_tokenizer: Tokenizer) -> None:
    template = ChatTemplate(source_of("smollm2"))
    messages = [says("user", "> quoted <"), says("assistant", "\ufdd0\ufdd1"), says("user", "a < b")]
    assert template.encode(byte_tokenizer, messages[1:2]) == byte_tokenizer.encode_with_specials(
        template.render(messages[1:2])
    )
    assert byte_tokenizer.decode_bytes(template.encode(byte_tokenizer, messages[::2]), keep_specials=True).decode() == (
        template.render(messages[::2])
    )


def test_marks_without_partner_mark_nothing() -> None:
    assert split_marks("a\ufdd0b\ufdd1c\ufdd1d\ufdd0e\ufdd0f\ufdd1") == ("abcdef", [(1, 2), (5, 6)])


@pytest.mark.model
def test_prompt_ids_are_transformers(tmp_path: Path) -> None:
    """Its own sanitizing, its own encoding, on its own tokenizer object over our tokenizer.json: the same ids."""
    from transformers import PreTrainedTokenizerFast

    source = Path("checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct")
    directory = ROOT / source
    ours, template = load_tokenizer(directory), load_chat_template(directory)
    assert template is not None
    reference = PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"))
    reference.chat_template = source_of("smollm2")
    for text in hard_strings()[::4]:
        if re.search("[\ufdd0\ufdd1\U000f0000\U000f0001]", text):  # its marks and ours: each drops its own
            continue
        messages = [says("system", "Be brief."), says("user", text)]
        want = reference.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False, sanitize_control_tokens=True
        )
        assert template.encode(ours, messages) == list(want)


@pytest.mark.model
def test_added_tokens_of_the_template_are_text_in_a_users_message(tmp_path: Path) -> None:
    """Not special, but part of the template: transformers' sanitizing keeps them text. In an earlier answer, where
    templates look for them, they are tokens as without it."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    source = ROOT / "checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct/tokenizer.json"
    backend = tokenizers.Tokenizer.from_file(str(source))
    names = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<unseen>")
    backend.add_tokens([tokenizers.AddedToken(name, special=False, normalized=False) for name in names])
    backend.save(str(tmp_path / "tokenizer.json"))
    ours, template = load_tokenizer(tmp_path), ChatTemplate(source_of("qwen3"))
    reference = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    reference.chat_template = source_of("qwen3")
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
    for text in ("a<think>b", "</think>", "<tool_call>{}</tool_call>", "x<unseen>y", "<think", "<|im_end|><think>"):
        messages = [says("user", text)]
        want = reference.apply_chat_template(messages, **options, sanitize_control_tokens=True)
        assert template.encode(ours, messages) == list(want)
    history = [says("user", "1"), says("assistant", "<think>\nhm\n</think>\n\n2"), says("user", "3")]
    assert template.encode(ours, history) == list(reference.apply_chat_template(history, **options))
