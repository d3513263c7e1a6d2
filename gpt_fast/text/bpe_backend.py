"""vocab.json and merges.txt, the older form of a byte-level BPE, as a backend of the `tokenizers` library.

The two files hold no rules of how a text is cut before its pieces merge: those are the tokenizer class's.
Reference: transformers 5, GPT2Tokenizer and Qwen2Tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpt_fast.text.gguf_tokenizer import SPLITS

CLASSES = ("GPT2Tokenizer", "Qwen2Tokenizer")
CLASS_OF = {"qwen2": "Qwen2Tokenizer", "qwen3": "Qwen2Tokenizer", "gpt2": "GPT2Tokenizer"}  # by model_type
END = "<|endoftext|>"  # each class's token where tokenizer_config.json names none


def bpe_class(config: Mapping[str, Any], model_config: Mapping[str, Any]) -> str:
    """Whose rules hold, by tokenizer_config.json, else config.json. ValueError where that is another's."""
    known = CLASS_OF.get(str(model_config.get("model_type")))
    name = str(config.get("tokenizer_class") or known).removesuffix("Fast")
    if name not in CLASSES:
        raise ValueError(
            f"tokenizer_class is not supported without a tokenizer.json (got {name}, allowed {', '.join(CLASSES)})"
        )
    return name


def bpe_backend(directory: Path, name: str, *, prefix_space: bool) -> Any:
    """A `tokenizers.Tokenizer` of the two files. name: the class. Raises what the library does for broken files."""
    import tokenizers

    bpe = tokenizers.models.BPE.from_file(str(directory / "vocab.json"), str(directory / "merges.txt"))
    backend = tokenizers.Tokenizer(bpe)
    backend.decoder = tokenizers.decoders.ByteLevel()
    before = tokenizers.pre_tokenizers
    if name == "GPT2Tokenizer":
        backend.pre_tokenizer = before.ByteLevel(add_prefix_space=prefix_space)
        return backend
    backend.normalizer = tokenizers.normalizers.NFC()
    splits = [before.Split(tokenizers.Regex(pattern), behavior="isolated") for pattern in SPLITS["qwen2"]]
    to_bytes = before.ByteLevel(add_prefix_space=prefix_space, use_regex=False)
    backend.pre_tokenizer = before.Sequence([*splits, to_bytes])
    return backend


def default_tokens(name: str) -> dict[str, str]:
    """The named tokens that a class has of itself."""
    return dict.fromkeys(
        ("eos_token", "unk_token") if name == "Qwen2Tokenizer" else ("bos_token", "eos_token", "unk_token"), END
    )
