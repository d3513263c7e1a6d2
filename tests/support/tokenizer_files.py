"""Small vocabularies in the forms in which tokenizers are published, trained here on the same few lines."""

from __future__ import annotations

import base64
import functools
import io
from pathlib import Path
from typing import Any

CORPUS = [
    "The quick brown fox jumps over the lazy dog.  It's 10:30, isn't it?\n\tdef f(x):\n\t\treturn x ** 2\n",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. 你好，世界 こんにちは 😀👍🏽 مرحبا שלום\n",
    "    for i in range(100):        # spaces\n        total += i * 3.14159\n\n\n",
] * 20
SIZE = 420  # of the SentencePiece models
BPE_SIZE = 400


def token(content: str, **flags: bool) -> dict[str, Any]:
    """An entry of added_tokens_decoder."""
    plain = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": False}
    return {"content": content, **plain, **flags}


def sentencepiece_file(**options: Any) -> bytes:
    """A tokenizer.model as Llama's: byte-pair pieces, byte fallback, <unk> <s> </s>."""
    import sentencepiece

    model = io.BytesIO()
    defaults = {
        "vocab_size": SIZE, "model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
        "minloglevel": 2, "character_coverage": 0.99, "remove_extra_whitespaces": False,
    }  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, **{**defaults, **options}
    )
    return model.getvalue()


@functools.cache
def rank_file() -> bytes:
    """A small vocabulary in the form of Llama 3's tokenizer.model: the bytes, then merges in order of frequency."""
    from tiktoken._educational import bpe_train

    from gpt_fast.text.gguf_tokenizer import LLAMA3_SPLIT

    ranks = bpe_train("".join(CORPUS), vocab_size=400, pat_str=LLAMA3_SPLIT)
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())


def save_bpe(directory: Path) -> None:
    """vocab.json and merges.txt of a byte-level BPE."""
    import tokenizers

    from gpt_fast.text.token_bytes import BYTE_OF

    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=BPE_SIZE, initial_alphabet=sorted(BYTE_OF), show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    backend.model.save(str(directory))
    assert backend.get_vocab_size() == BPE_SIZE
