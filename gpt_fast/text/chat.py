"""Chat templates, rendered as transformers renders them: Jinja, sandboxed, from the checkpoint's own files only, in a
process of its own with bounded time and memory.

A rendered conversation mixes the template's control tokens with whatever users wrote. `encode` keeps the two apart:
a control token spelled in a message is marked before rendering, and stays text when the prompt is encoded.
Messages are plain JSON values; their shape is the server's to check. Errors are ChatTemplateError, one line.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gpt_fast.files import read_json_object
from gpt_fast.text.side_facts import read_special_tokens
from gpt_fast.text.template_process import CLOSE, OPEN
from gpt_fast.text.template_renderer import TemplateError, shared_renderer
from gpt_fast.text.tokenizer import PromptTooLong, Span, Tokenizer, control_pattern

MAX_PROMPT_CHARS = 16 * 2**20
# What the call itself gives a template or decides about it; chat_template_kwargs may not.
CALL_NAMES = frozenset({
    "messages", "conversation", "tools", "documents", "add_generation_prompt", "continue_final_message",
    "chat_template", "tokenize",
})  # fmt: skip
PROBE = "vermilion"  # no template says it of itself
TAG = "CONTINUE_FINAL_MESSAGE "  # its space shows whether the template trims messages


class ChatTemplateError(ValueError):
    """A template that cannot be read or will not render these messages, in one line."""


class ToolFormat(NamedTuple):
    """How a model writes a call: `before`, {"name": ..., arguments_key: {...}}, `after`, white space apart."""

    before: str
    arguments_key: str
    after: str


HERMES = ToolFormat("<tool_call>", "arguments", "</tool_call>")  # NousResearch's Hermes 2 Pro, Qwen 2.5 and 3, ...
LLAMA = ToolFormat("", "parameters", "")  # Meta's Llama 3.1: the call is the whole answer


def read_tool_format(source: str) -> ToolFormat | None:
    """The format that a template tells its model to use; None for one without tools, or with an unknown format."""
    if re.search(r"<tool_call>(\\n|\s)*\{[^}]*\\?\"arguments\\?\"", source):
        return HERMES
    return LLAMA if re.search(r"\{\\?\"name\\?\": function name, \\?\"parameters\\?\":", source) else None


class ChatTemplate:
    """One checkpoint's chat template.

    source: the Jinja text, None where the checkpoint has no default one; tool_source: the one for requests with tools,
    where a checkpoint has its own for them. names: of all its templates, for messages.
    special_tokens: the variables bos_token, eos_token, ... A rendering longer than max_chars is refused.
    tool_format: how the model writes calls; None where the template takes no tools.
    """

    def __init__(
        self,
        source: str | None,
        *,
        tool_source: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
        max_chars: int = MAX_PROMPT_CHARS,
        names: Sequence[str] = (),
    ) -> None:
        self._template = None if source is None else CompiledTemplate(source)
        self._tool_template = self._template if tool_source is None else CompiledTemplate(tool_source)
        self.tool_format = read_tool_format(tool_source or source or "")
        self._sources = f"{source or ''}\n{tool_source or ''}"
        self._special_tokens = dict(special_tokens or {})
        self._max_chars = max_chars
        self._names = names

    def mentions(self, *texts: str) -> bool:
        """Whether every one of the texts stands in the template's source."""
        return all(text in self._sources for text in texts)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt's text.

        continue_final_message: the prompt ends where the last message's content does, for the model to go on.
        chat_template_kwargs: what else the template asks for, such as Qwen3's enable_thinking.
        """
        template = self._template if tools is None else self._tool_template
        if template is None:
            has = ", ".join(self._names)
            raise ChatTemplateError(f'chat template: this checkpoint has none named "default" (got {has})')
        check_options(chat_template_kwargs or {}, add_generation_prompt and continue_final_message)
        messages = [template.with_content(message) for message in messages]
        variables = self._special_tokens | {
            **(chat_template_kwargs or {}),
            "messages": tagged(messages) if continue_final_message else messages,
            "tools": tools,
            "documents": documents,
            "add_generation_prompt": add_generation_prompt,
        }
        text = template.render(variables, max_chars=self._max_chars)
        return until_tag(text, last_text(messages)) if continue_final_message else text

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Mapping[str, Any]],
        *,
        max_characters: int | None = None,
        **options: Any,
    ) -> list[int]:
        """The prompt's token ids; options are render's. Control tokens in messages, tools and documents are text. So
        are added tokens that are not special but part of the template, except in the assistant's messages (for the
        rest, as transformers does with sanitize_control_tokens).

        PromptTooLong for a rendered text of more than max_characters, before it is encoded.
        """
        request = map_strings({"messages": messages, **options}, without_marks)
        named = tuple(token for token in tokenizer.added_tokens if token in self._sources and not token.isspace())
        marked = self._marked(request, tokenizer.control_tokens, (*tokenizer.control_tokens, *named))
        plain = marked == request  # nothing to keep apart
        text, literal = (self.render(messages, **options), []) if plain else split_marks(self.render(**marked))
        if max_characters is not None and len(text) > max_characters:
            raise PromptTooLong(len(text), max_characters)
        return tokenizer.encode_with_specials(text, literal=literal, named=named)

    def _marked(
        self, request: Mapping[str, Any], control_tokens: tuple[str, ...], others_tokens: tuple[str, ...]
    ) -> dict[str, Any]:
        """The request with marks around tokens that it spells. A model's earlier answers may spell those that are not
        special, as <think> and <tool_call>: templates look for them there."""
        messages = []
        for message in request["messages"]:
            tokens = control_tokens if message.get("role") == "assistant" else others_tokens
            messages.append(map_strings(message, functools.partial(mark_control_tokens, control_tokens=tokens)))
        rest = {name: value for name, value in request.items() if name != "messages"}
        marked = map_strings(rest, functools.partial(mark_control_tokens, control_tokens=others_tokens))
        return {"messages": messages, **marked}


class CompiledTemplate:
    """A template that compiles, and the form of content that it takes."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._renderer = shared_renderer()
        try:
            self.content_format = self._renderer.content_format(source)
        except TemplateError as error:
            raise ChatTemplateError(f"chat template: {error}") from None

        if self.content_format == "string" and self._drops(PROBE) and not self._drops(as_parts(PROBE)):
            self.content_format = "parts"  # by a macro, a namespace, ...: what the syntax does not tell, a try does

    def _drops(self, content: str | list[dict[str, str]]) -> bool:
        """Whether a user's message of this content leaves no text in the prompt."""
        variables: dict[str, Any] = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), "")
        variables |= {"messages": [{"role": "user", "content": content}], "tools": None, "add_generation_prompt": True}
        try:
            text = self.render(variables, max_chars=MAX_PROMPT_CHARS)
        except ChatTemplateError:
            return True
        return not re.search(rf"(?<!['\"]){PROBE}", text)  # in quotes it is a list's, written as it is

    def render(self, variables: dict[str, Any], *, max_chars: int) -> str:
        try:
            return self._renderer.render(self._source, variables, max_chars=max_chars)
        except TemplateError as error:
            raise ChatTemplateError(f"chat template: {error}") from None

    def with_content(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        """The message with its content in the template's form. What is neither text nor text parts stays as it is."""
        content = message.get("content")
        if isinstance(content, str) and self.content_format == "parts":
            return {**message, "content": as_parts(content)}
        if isinstance(content, list) and content and self.content_format == "string" and all(map(is_text, content)):
            return {**message, "content": "".join(part["text"] for part in content)}
        return message


def as_parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def is_text(part: object) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)


def check_options(chat_template_kwargs: Mapping[str, Any], both: bool) -> None:
    """both: whether a new answer and more of the last message are asked for at once."""
    for name in chat_template_kwargs:
        if name in CALL_NAMES:
            raise ChatTemplateError(f"chat_template_kwargs: {name} is set by the request itself")
    if both:
        raise ChatTemplateError("continue_final_message: does not go with add_generation_prompt, set one to false")


# ------------------------------------------------------------ the last message, for the model to go on
# As transformers does it: a tag behind the content shows where the rendered content ends.


def last_text(messages: Sequence[Mapping[str, Any]]) -> str:
    """The text to go on from: the last message's content, or its last text part."""
    content = messages[-1].get("content") if messages else None
    if isinstance(content, list):
        content = next((part["text"] for part in reversed(content) if "text" in part), None)
    if not isinstance(content, str):
        raise ChatTemplateError("continue_final_message: the last message has no text to continue")
    return content


def tagged(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The messages with the tag behind the last one's text."""
    text = last_text(messages)
    content = messages[-1]["content"]
    if isinstance(content, list):
        at = max(index for index, part in enumerate(content) if "text" in part)
        content = [*content[:at], {**content[at], "text": text + TAG}, *content[at + 1 :]]
    else:
        content = text + TAG
    return [*messages[:-1], {**messages[-1], "content": content}]


def until_tag(rendered: str, text: str) -> str:
    """What stands before the tag; without the spaces at its end where the template trims its messages."""
    at = rendered.rfind(TAG.strip())
    if at < 0 or text.strip() not in rendered:
        raise ChatTemplateError("continue_final_message: the chat template does not render the last message whole")
    before = rendered[:at]
    return before if rendered.startswith(TAG, at) else before.rstrip()


# -------------------------------------------------------------------------- from the checkpoint's files


def load_chat_template(checkpoint_dir: Path) -> ChatTemplate | None:
    """The checkpoint's chat templates: "default" is used, and "tool_use" for requests with tools. None: it has none.

    chat_template.jinja is the default one and additional_chat_templates/NAME.jinja are the others; else
    tokenizer_config.json's "chat_template", one or a list of named ones.
    """
    directory = Path(checkpoint_dir)
    config = directory / "tokenizer_config.json"
    found = read_json_object(config, optional=True).get("chat_template")
    path = directory / "chat_template.jinja"
    try:
        if found is None or path.is_file():
            named = {}
        else:
            named = {"default": found} if isinstance(found, str) else {each["name"]: each["template"] for each in found}
        for file in [path, *sorted((directory / "additional_chat_templates").glob("*.jinja"))]:
            if file.is_file():
                named["default" if file == path else file.stem] = file.read_text(encoding="utf-8")
        for name, source in named.items():
            if not isinstance(source, str):
                raise TypeError(f"{name} is no text")
    except (TypeError, KeyError) as error:
        raise ChatTemplateError(f"{config}: chat_template is neither text nor a list of named ones ({error})") from None
    if not named:
        return None
    special_tokens, names = read_special_tokens(directory), sorted(named)
    return ChatTemplate(
        named.get("default"), tool_source=named.get("tool_use"), special_tokens=special_tokens, names=names
    )


# ---------------------------------------------------- which characters of a rendered prompt users wrote

# Its marks, OPEN and CLOSE, are noncharacters: no text is meant to hold them, no tokenizer knows them.


def map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """A copy of a JSON value with every string in it, keys too, changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(key): map_strings(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [map_strings(item, change) for item in value]
    return value


def without_marks(text: str) -> str:
    return re.sub(f"[{OPEN}{CLOSE}]", "", text) if OPEN in text or CLOSE in text else text


def mark_control_tokens(text: str, control_tokens: tuple[str, ...]) -> str:
    """The text with marks around every control token in it, and around an end that the text beside it in the prompt
    could complete to one. Names (roles, keys) are left alone: templates compare them."""
    if text.isidentifier():
        return text
    pattern, beginnings, endings = control_shapes(control_tokens)
    spans = [match.span() for match in pattern.finditer(text)]
    lengths = range(min(len(text), max(map(len, control_tokens), default=0)), 0, -1)
    head = next((n for n in lengths if text[:n] in endings), 0)
    tail = next((n for n in lengths if text[-n:] in beginnings), 0)
    if head and not (spans and spans[0][0] < head):
        spans.insert(0, (0, head))
    if tail and not (spans and spans[-1][1] > len(text) - tail):
        spans.append((len(text) - tail, len(text)))
    if not spans:
        return text
    ends = [0, *(end for _, end in spans)]
    marked = [f"{text[a:start]}{OPEN}{text[start:end]}{CLOSE}" for a, (start, end) in zip(ends, spans, strict=False)]
    return "".join(marked) + text[ends[-1] :]


@functools.lru_cache(maxsize=8)
def control_shapes(control_tokens: tuple[str, ...]) -> tuple[re.Pattern[str], frozenset[str], frozenset[str]]:
    """(a pattern for whole control tokens, their proper beginnings, their proper endings)"""
    cuts = [(token, cut) for token in control_tokens for cut in range(1, len(token))]
    beginnings, endings = (token[:cut] for token, cut in cuts), (token[cut:] for token, cut in cuts)
    return control_pattern(control_tokens), frozenset(beginnings), frozenset(endings)


def split_marks(marked: str) -> tuple[str, list[Span]]:
    """(the text without marks, the spans that were marked). A template may cut a string between two marks: a mark
    without its partner marks nothing."""
    pieces, spans, length = [], [], 0
    for n, piece in enumerate(re.split(f"{OPEN}([^{OPEN}{CLOSE}]*){CLOSE}|[{OPEN}{CLOSE}]", marked)):
        if not piece:
            continue
        if n % 2:  # what the pattern caught
            spans.append((length, length + len(piece)))
        pieces.append(piece)
        length += len(piece)
    return "".join(pieces), spans
