"""Guides: which tokens may come next so that an answer matches a JSON schema, a regular expression, one of several
texts or a grammar, or calls a tool. llguidance does the work.

A `Maker` compiles once a constraint, off the engine's thread, and makes one `Guide` for each sequence; sampling asks
the guide for the allowed tokens (config.Guide is what it knows of it). No torch here.
Library: https://github.com/guidance-ai/llguidance (Earley parser over token tries, lazy lexer).
"""

from __future__ import annotations

import importlib.util
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from gpt_fast.text.chat import ToolFormat
from gpt_fast.text.grammar_check import check
from gpt_fast.text.json_schema import SchemaError, exact_schema
from gpt_fast.text.regex_dialect import respelled
from gpt_fast.text.tokenizer import Tokenizer

MAX_GRAMMAR = 65_536  # bytes of what is compiled: schemas and what stands around them
KEPT = 32  # compiled grammars
# Unbounded white space is what a weak model says when it knows nothing else; unknown keywords are refused, not ignored.
JSON_OPTIONS = {"whitespace_pattern": r"( |\n {0,16})", "lenient": False}


class Constraint(NamedTuple):
    """What an answer must match. text: a JSON schema, an expression that matches all of it, a JSON list of the texts it
    may be, or a grammar in GBNF or llguidance's Lark. compact: no white space in JSON."""

    kind: Literal["json", "regex", "choice", "grammar"]
    text: str
    compact: bool = False


class GuideError(ValueError):
    """A constraint that cannot be compiled, in one line."""


class Guide:
    """The grammar of one sequence and how far its output has come in it. Used by one thread at a time."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher = matcher
        self._nothing = bytes(vocab_size)
        self._seen = 0

    def allowed(self, output: Sequence[int]) -> bytes:
        """One byte a token of the vocabulary, 0 for those that may not follow `output`.

        `output` begins with what it was in the call before. EOS is allowed only when the grammar is complete. All are
        0 when the grammar became too complex to follow: such an answer cannot go on.
        """
        for token in output[self._seen :]:
            if not self._matcher.is_stopped():  # else complete: what follows the end (ignore_eos) changes nothing
                self._matcher.consume_token(token)
        self._seen = len(output)
        if self._matcher.is_error():
            return self._nothing
        allowed = self._matcher.compute_logit_bias()  # in a dead end it allows EOS, and says so only by an error
        return self._nothing if self._matcher.is_error() else allowed


class Maker:
    """Compiles grammars for one tokenizer. Thread-safe.

    vocab_size: the logits' size, which may be above the tokenizer's. eos_ids: the tokens that end an answer.
    Without llguidance there is a Maker all the same, which refuses everything by name.
    """

    def __init__(self, tokenizer: Tokenizer, *, vocab_size: int, eos_ids: Iterable[int]) -> None:
        self.vocab_size = vocab_size
        eos_ids = sorted(eos_ids)
        self._tokenizer = build_tokenizer(tokenizer, vocab_size, eos_ids) if eos_ids and available() else None
        self._compiled: OrderedDict[str, Any] = OrderedDict()
        self._lark: dict[str, str] = {}  # of GBNF
        self._lock = threading.Lock()

    def guide(self, constraint: Constraint, *, thinking: bool = False) -> Guide:
        """A guide to the answers that match. GuideError for a constraint that is none, too large or not supported.

        thinking: the answer begins inside of a model's reasoning, and matches from behind its </think> on.
        """
        try:
            return self._guide(self._grammar(constraint), thinking=thinking)
        except GuideError as error:
            if constraint.kind != "grammar":
                raise
            raise GuideError(
                f"{error} (allowed GBNF, with root ::= ..., or llguidance's Lark, with start: ...)"
            ) from None

    def _grammar(self, constraint: Constraint) -> str:
        if constraint.kind == "grammar" and is_gbnf(constraint.text):
            return self._converted(constraint.text)
        try:
            return FORMS[constraint.kind](constraint)
        except ValueError as error:
            raise GuideError(" ".join(str(error).split())) from None
        except RecursionError:
            raise GuideError("nested too deeply") from None

    def _converted(self, gbnf: str) -> str:
        """As the compiler takes it; in a process that can be stopped."""
        with self._lock:
            known = self._lark.get(gbnf)
        if known is None:
            matcher_class()
            problem, known = check(gbnf, gbnf=True)
            if problem:
                raise GuideError(advised(problem))
            with self._lock:
                self._lark = dict([*self._lark.items(), (gbnf, known)][-KEPT:])
        return known

    def calls_guide(
        self,
        tools: Sequence[Mapping[str, Any]],
        form: ToolFormat,
        *,
        parallel: bool = False,
        answer: Constraint | None = None,
        thinking: bool = False,
    ) -> Guide:
        """A guide to a call of one of the tools, which are OpenAI's objects. GuideError as above.

        parallel: several calls may come, where the form can tell them apart. answer: or one that matches this.
        """
        try:
            grammar = calls_grammar(tools, form, parallel=parallel, answer=answer is not None)
        except SchemaError as error:
            raise GuideError(str(error)) from None
        if answer is not None:
            grammar = joined(grammar, "answer", self._grammar(answer))
        return self._guide(grammar, thinking=thinking)

    def _guide(self, grammar: str, *, thinking: bool = False) -> Guide:
        matcher_class()  # says so where there is none
        grammar = joined(THINKING, "said", grammar) if thinking else grammar
        with self._lock:
            matcher = self._compiled.get(grammar)
        if matcher is None:
            matcher = self._compile(grammar)
        with self._lock:
            self._compiled[grammar] = matcher
            self._compiled.move_to_end(grammar)
            while len(self._compiled) > KEPT:
                self._compiled.popitem(last=False)
            return Guide(matcher.deep_copy(), self.vocab_size)

    def _compile(self, grammar: str) -> Any:
        """First in a process that can be stopped, then here."""
        if self._tokenizer is None:
            raise GuideError("this checkpoint has no end-of-sequence token")
        size = len(grammar.encode())
        if size > MAX_GRAMMAR:
            raise GuideError(f"{size} bytes in all (allowed {MAX_GRAMMAR})")
        problem, _ = check(grammar)
        if problem:
            raise GuideError(advised(problem))
        matcher = matcher_class()(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise GuideError(advised(" ".join(matcher.get_error().split())))
        if not any(Guide(matcher.deep_copy(), self.vocab_size).allowed([])):  # such as a "$ref" that leads to itself
            raise GuideError("no value matches it")
        return matcher


def json_form(constraint: Constraint) -> str:
    schema = json.dumps(exact_schema(json.loads(constraint.text)))
    options = JSON_OPTIONS | ({"whitespace_pattern": "", "whitespace_flexible": False} if constraint.compact else {})
    return str(matcher_class().grammar_from_json_schema(schema, overrides=options))


def regex_form(constraint: Constraint) -> str:
    return str(matcher_class().grammar_from_regex(respelled(constraint.text)))


def choice_form(constraint: Constraint) -> str:
    texts = (json.dumps(text, ensure_ascii=False) for text in json.loads(constraint.text))
    return str(matcher_class().grammar_from_lark(f"start: {' | '.join(texts)}"))


def lark_form(constraint: Constraint) -> str:
    return str(matcher_class().grammar_from_lark(constraint.text))


FORMS: Mapping[str, Callable[[Constraint], str]] = {
    "json": json_form,
    "regex": regex_form,
    "choice": choice_form,
    "grammar": lark_form,
}
# Reasoning that has begun, and what must follow it.
THINKING = r"""start: thinking gap @said
thinking[lazy]: /(.|\n)*<\/think>/
gap: /[ \n]{0,4}/"""


def joined(lark: str, name: str, grammar: str) -> str:
    """A grammar whose @name is another one."""
    first, *rest = json.loads(grammar)["grammars"] if grammar.startswith("{") else [{"lark_grammar": grammar}]
    return json.dumps({"grammars": [{"lark_grammar": lark}, {**first, "name": name}, *rest]})


def is_gbnf(grammar: str) -> bool:
    """Whether a grammar is written as llama.cpp's are, with ::=."""
    return re.search(r"(?m)^[ \t]*[\w-]+[ \t]*::=", grammar) is not None


ADVICE = {
    "Unknown format: ": "; leave it out, or give a pattern",
    "oneOf constraints are not supported": "; oneOf needs choices that exclude each other, as by a const in each: else "
    "use anyOf",
    "Unimplemented keys: ": "; leave them out",
    "Invalid type: ": " (allowed null, boolean, integer, number, string, array, object)",
    "is not present in a registry": "; put it into $defs of the schema itself",
    "Failed to generate regex": "; leave the bound out",
}


def advised(problem: str) -> str:
    """The compiler's words, and what a client can do."""
    problem = problem.removesuffix(". Enable 'coerce_one_of' option to approximate oneOf with anyOf")
    problem = re.sub(r"(?<!\w)'((?:\\.|[^'\\])*)'", r'"\1"', problem)  # quoted as in JSON
    return problem + next((advice for start, advice in ADVICE.items() if start in problem), "")


MAX_CALLS = 16  # of an answer that may make several


def calls_grammar(
    tools: Sequence[Mapping[str, Any]], form: ToolFormat, *, parallel: bool = False, answer: bool = False
) -> str:
    """llguidance's Lark for a call of one of the tools, or several; or for @answer.

    Every tool's parameters are a schema document of their own, so their "$ref"s mean what they meant.
    """
    before, after = (f"{form.before}\n", f"\n{form.after}") if form.before else ("", "")
    more = f' ("\\n" call){{0,{MAX_CALLS - 1}}}' if parallel and form.before else ""
    rules = [f"start: call{more}{' | @answer' if answer else ''}"]
    rules.append(f"call: {' | '.join(f'call{index}' for index in range(len(tools)))}")
    for index, tool in enumerate(tools):
        function = tool["function"]
        parameters = exact_schema(function.get("parameters") or {}, function["name"])
        schema = {"type": "object", **parameters, "x-guidance": JSON_OPTIONS}
        head = f'{before}{{"name": {json.dumps(function["name"])}, "{form.arguments_key}": '
        rules.append(f"call{index}: {json.dumps(head)} arguments{index} {json.dumps('}' + after)}")
        written = f"%json {json.dumps(schema)}" if takes_any(parameters) else '"{}"'
        rules.append(f"arguments{index}: {written}")
    return "\n".join(rules)


SAYS_NOTHING = ("type", "properties", "required", "title", "description", "$schema", "strict", "$defs", "definitions")


def takes_any(parameters: Mapping[str, Any]) -> bool:
    """Whether a tool's schema speaks of arguments at all: of one without, clients mean no arguments, not any."""
    told = parameters.get("properties") or parameters.get("required")
    return bool(told) or any(name not in SAYS_NOTHING for name in parameters)


def available() -> bool:
    return importlib.util.find_spec("llguidance") is not None


def matcher_class() -> Any:
    if not available():
        raise GuideError("the server needs `pip install 'llguidance>=1.3'`")
    from llguidance import LLMatcher

    return LLMatcher


def build_tokenizer(tokenizer: Tokenizer, vocab_size: int, eos_ids: list[int]) -> Any:
    """llguidance's tokenizer of our token bytes."""
    from llguidance import LLTokenizer

    vocabulary: Any = Vocabulary(tokenizer, vocab_size, eos_ids)
    return LLTokenizer(vocabulary, n_vocab=vocab_size, eos_token=eos_ids, slices=LLTokenizer.json_slices())


class Vocabulary:
    """What LLTokenizer asks of a tokenizer. A token without bytes, and every EOS, is special: never part of a text."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: list[int]) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id, self.bos_token_id = eos_ids[0], tokenizer.bos_id
        known = [tokenizer.token_bytes(token) for token in range(vocab_size)]
        self.special_token_ids = sorted({*eos_ids, *(token for token, text in enumerate(known) if not text)})
        for token in self.special_token_ids:
            known[token] = b"<[%d]>" % token
        self.tokens = known
        self._by_bytes = {text: token for token, text in enumerate(known)}

    def __call__(self, text: str) -> list[int]:
        """Tokens whose bytes are exactly the text's: the library counts on it.

        The tokenizer's own where it has such: SentencePiece puts a space before a text, but not before its second
        line. Else (a normalizer changes the text) the longest that fit.
        """
        encode = self._tokenizer.encode
        for before in ("", "\n"):
            head, ids = encode(before, add_bos=False), encode(before + text, add_bos=False)
            rest = ids[len(head) :]
            if ids[: len(head)] == head and b"".join(self.tokens[token] for token in rest) == text.encode():
                return rest
        return self._longest(text.encode())

    def _longest(self, text: bytes) -> list[int]:
        ids = []
        while text:
            size = next((size for size in range(len(text), 0, -1) if text[:size] in self._by_bytes), None)
            if size is None:
                raise GuideError(f"the tokenizer has no token for the byte {text[0]:#x}")
            ids.append(self._by_bytes[text[:size]])
            text = text[size:]
        return ids
