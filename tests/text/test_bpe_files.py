"""A directory with only vocab.json and merges.txt has transformers' ids, added tokens included."""

import json
from pathlib import Path
from typing import Any

import pytest

from gpt_fast.text.load_tokenizer import load_tokenizer
from gpt_fast.text.tokenizer import TokenizerError
from support.hard_strings import hard_strings
from support.tokenizer_files import BPE_SIZE as SIZE
from support.tokenizer_files import save_bpe, token

TEXTS = [
    "<|im_start|>user\nIt's 10:30<|im_end|>\n",
    "a <tool> b<tool>c",
    "<|endoftext|>x",
    "e\u0301",
    "",
    " two  spaces ",
]


DECODER = {
    str(SIZE): token("<|endoftext|>", special=True),
    str(SIZE + 1): token("<|im_start|>", special=True),
    str(SIZE + 2): token("<|im_end|>", special=True, rstrip=True),
    str(SIZE + 3): token("<tool>"),
}
QWEN = {
    "tokenizer_class": "Qwen2Tokenizer",
    "added_tokens_decoder": DECODER,
    "eos_token": "<|im_end|>",
    "bos_token": None,
}
LAYOUTS: dict[str, tuple[str, dict[str, Any], dict[str, int] | None]] = {
    "qwen2": ("qwen2", QWEN, None),
    "qwen3, fast": ("qwen3", {**QWEN, "tokenizer_class": "Qwen2TokenizerFast"}, None),
    "by model_type": ("qwen2", {"added_tokens_decoder": DECODER}, None),
    "no tokens of its own": ("qwen2", {}, None),
    "gpt2": ("llama", {"tokenizer_class": "GPT2Tokenizer", "added_tokens_decoder": DECODER}, None),
    "gpt2, bos": ("llama", {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True}, None),
    "gpt2, prefix": ("llama", {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}, None),
    "old added_tokens": (
        "qwen2",
        {"tokenizer_class": "Qwen2Tokenizer", "additional_special_tokens": ["<|im_start|>", "<|im_end|>"]},
        {"<|endoftext|>": SIZE, "<|im_start|>": SIZE + 1, "<|im_end|>": SIZE + 2, "<tool>": SIZE + 3},
    ),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("trained")
    save_bpe(directory)
    return directory


def write(directory: Path, trained: Path, model_type: str, config: Any, added: Any = None) -> Path:
    for name in ("vocab.json", "merges.txt"):
        (directory / name).write_bytes((trained / name).read_bytes())
    (directory / "config.json").write_text(json.dumps({"model_type": model_type}))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    if added:
        (directory / "added_tokens.json").write_text(json.dumps(added))
    return directory


@pytest.mark.parametrize("name", LAYOUTS)
def test_ids_and_texts_are_transformers(tmp_path: Path, trained: Path, name: str) -> None:
    from transformers import AutoTokenizer

    directory = write(tmp_path, trained, *LAYOUTS[name])
    ours, reference = load_tokenizer(directory), AutoTokenizer.from_pretrained(directory)
    for text in TEXTS:
        assert ours.encode_with_specials(text) == reference.encode(text, add_special_tokens=False)
    for text in (*TEXTS, *hard_strings()[::4]):
        ids = ours.encode(text)
        assert ids == reference.encode(text, split_special_tokens=True)
        assert ours.decode_bytes(ids).decode() == reference.decode(ids, skip_special_tokens=True)
    assert ours.eos_ids == {reference.eos_token_id} and ours.bos_id == reference.bos_token_id
    assert ours.vocab_size == len(reference)


def test_another_class_is_refused_by_name(tmp_path: Path, trained: Path) -> None:
    write(tmp_path, trained, "llama", {"tokenizer_class": "RobertaTokenizer"})
    with pytest.raises(TokenizerError, match=r"got RobertaTokenizer, allowed GPT2Tokenizer, Qwen2Tokenizer\)$"):
        load_tokenizer(tmp_path)


def test_broken_files_are_named(tmp_path: Path, trained: Path) -> None:
    write(tmp_path, trained, "qwen2", {"added_tokens_decoder": {"7000": token("<far>")}})
    with pytest.raises(TokenizerError, match=r"vocab\.json: added token '<far>' has the id 7000"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text("{")
    with pytest.raises(TokenizerError, match=r"vocab\.json: [^\n]+$"):
        load_tokenizer(tmp_path)
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(TokenizerError, match=r"looked for .* vocab\.json with merges\.txt"):
        load_tokenizer(tmp_path)
