"""Text to token ids and back: vLLM's /tokenize, /detokenize and /tokenizer_info, llama-server's /tokenize.

Answered without the model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gpt_fast.llm import Engine
from gpt_fast.serve import messages
from gpt_fast.serve.body import RequestError, expect, in_words_of, short
from gpt_fast.serve.prompt_logprobs import token_name

Fields = dict[str, Any]
EncodeChat = Callable[[Fields], list[int]]  # of a chat completion's body

SHARED = {"model", "add_special_tokens"}
KNOWN = {  # by the field that holds the text
    "prompt": SHARED | {"prompt", "return_token_strs", "parse_special"},
    "content": SHARED | {"content", "with_pieces", "parse_special", "add_special"},
    "messages": SHARED
    | {"messages", "return_token_strs", "add_generation_prompt", "continue_final_message", "chat_template_kwargs"}
    | {"tools", "documents", "reasoning_effort"},
}
SWITCHES = {"add_special_tokens", "add_special", "parse_special", "return_token_strs", "with_pieces"}


def tokenize(engine: Engine, fields: Fields, encode_chat: EncodeChat) -> Fields:
    """Token ids of a `prompt`, of a chat's `messages`, or, as llama-server asks for them, of a `content`."""
    kinds = [kind for kind in KNOWN if kind in fields]
    if len(kinds) != 1:
        got = ", ".join(kinds) or "none"
        raise RequestError(f"prompt: give one of prompt, messages and content (got {got})", param="prompt")
    (kind,) = kinds
    check_fields(fields, KNOWN[kind])
    tokens = chat_tokens(fields, encode_chat) if kind == "messages" else text_tokens(engine, fields, kind)
    if kind == "content":
        return {"tokens": [with_piece(engine, token) for token in tokens] if fields.get("with_pieces") else tokens}
    strings = [token_text(engine, token) for token in tokens] if fields.get("return_token_strs") else None
    max_model_len = engine.core.max_seq_len
    return {"count": len(tokens), "max_model_len": max_model_len, "tokens": tokens, "token_strs": strings}


def text_tokens(engine: Engine, fields: Fields, kind: str) -> list[int]:
    """As a completion's prompt; llama-server's begins without BOS unless asked."""
    expect(fields[kind], kind, str, "a string")
    begins = bool(fields.get("add_special")) if kind == "content" else True
    begins = bool(fields.get("add_special_tokens", begins))
    try:
        return engine.encode(fields[kind], add_bos=begins, specials=fields.get("parse_special", True))
    except ValueError as error:
        raise RequestError(f"{kind}: {error}", param=kind) from None


def chat_tokens(fields: Fields, encode_chat: EncodeChat) -> list[int]:
    """As a chat's prompt."""
    if fields.get("add_special_tokens"):
        message = "the chat template writes special tokens itself (got true, allowed false)"
        raise RequestError(f"add_special_tokens: {message}", param="add_special_tokens")
    others = {"add_special_tokens", "return_token_strs"}
    return encode_chat({name: value for name, value in fields.items() if name not in others})


def count_message_tokens(engine: Engine, fields: Fields, encode_chat: EncodeChat) -> Fields:
    """Anthropic's count_tokens."""
    body, names = messages.count_body(fields)
    with in_words_of(names):
        return {"input_tokens": len(encode_chat(body))}


def detokenize(engine: Engine, fields: Fields, encode_chat: EncodeChat) -> Fields:
    """The text of token ids, special tokens too: vLLM's `prompt`, llama-server's `content`."""
    check_fields(fields, {"model", "tokens"})
    tokens, vocabulary = fields.get("tokens"), engine.model_config.vocab_size
    expect(tokens, "tokens", list, "a list of token ids")
    for token in tokens:  # type: ignore[union-attr]
        if type(token) is not int or not 0 <= token < vocabulary:
            message = f"tokens: {short(token)} is no token id (allowed 0..{vocabulary - 1})"
            raise RequestError(message, param="tokens")
    text = engine.tokenizer.decode_bytes(tokens, keep_specials=True).decode("utf-8", "replace")  # type: ignore[arg-type]
    return {"prompt": text, "content": text}


def tokenizer_info(engine: Engine) -> Fields:
    """The special tokens that clients look for; a client with a tokenizer of its own has the rest."""
    bos, eos = engine.tokenizer.bos_id, min(engine.eos_ids, default=None)
    return {
        "bos_token": None if bos is None else token_text(engine, bos),
        "eos_token": None if eos is None else token_text(engine, eos),
        "vocab_size": engine.model_config.vocab_size,
        "max_model_len": engine.core.max_seq_len,
    }


def check_fields(fields: Fields, known: set[str]) -> None:
    for name in fields:
        if name not in known:
            raise RequestError(f"{short(name)}: unknown field (allowed {', '.join(sorted(known))})", param=name)
    for name in sorted(SWITCHES & fields.keys()):
        expect(fields[name], name, bool, "true or false")


def token_text(engine: Engine, token: int) -> str:
    return token_name(engine.tokenizer.token_bytes(token, keep_specials=True))


def with_piece(engine: Engine, token: int) -> Fields:
    """llama-server's form: bytes where they are no text."""
    data = engine.tokenizer.token_bytes(token, keep_specials=True)
    try:
        return {"id": token, "piece": data.decode("utf-8")}
    except UnicodeDecodeError:
        return {"id": token, "piece": list(data)}
