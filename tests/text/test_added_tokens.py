"""A SentencePiece model with tokens that JSON files add to it: transformers' ids, in prompts and in templates."""

import json
from pathlib import Path
from typing import Any

import pytest

from gpt_fast.text.added_tokens import read_added_tokens
from gpt_fast.text.chat import ChatTemplate
from gpt_fast.text.load_tokenizer import load_tokenizer
from gpt_fast.text.sentencepiece_backend import read_piece_table
from gpt_fast.text.sentencepiece_tokenizer import SentencePieceTokenizer
from gpt_fast.text.tokenizer import TokenizerError
from support.hard_strings import hard_strings
from support.tiny_tokenizers import Special, bytes_json, special
from support.tokenizer_files import SIZE, rank_file, sentencepiece_file, token

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{{ '<|im_start|>assistant\n' }}"
)
TEXTS = [
    "Hi",
    "",
    " two  spaces ",
    "<|im_start|>user\nquick brown<|im_end|>\n<|im_start|>assistant\n",
    "a <tool> b<tool>c",
    "x</s>y <s> z",
    "<|im_start|>  <|im_end|>é<tool>\n",
    "<|im_end|><|im_end|>",
    "no<unk>pe 你好 \U0001f600",
]
LEGACY = {"<|im_start|>": SIZE, "<|im_end|>": SIZE + 1, "<tool>": SIZE + 2}


DECODER = {
    "0": token("<unk>", special=True),
    "1": token("<s>", special=True),
    "2": token("</s>", special=True),
    str(SIZE + 1): token("<|im_end|>", special=True, rstrip=True),
    str(SIZE): token("<|im_start|>", special=True),
    str(SIZE + 2): token("<tool>", lstrip=True),
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "added_tokens.json": {"tokenizer_config": {"add_bos_token": False}, "added_tokens": LEGACY},
    "a named eos": {"tokenizer_config": {"add_bos_token": True, "eos_token": "<|im_end|>"}, "added_tokens": LEGACY},
    "old special_tokens_map": {
        "tokenizer_config": {"add_bos_token": True},
        "special_tokens_map": {"eos_token": token("<|im_end|>"), "extra_special_tokens": ["<|im_start|>", "</s>"]},
        "added_tokens": LEGACY,
    },
    "added_tokens_decoder": {"tokenizer_config": {"add_bos_token": True, "added_tokens_decoder": DECODER}},
    "both": {
        "tokenizer_config": {"add_bos_token": False, "added_tokens_decoder": DECODER, "eos_token": "<|im_end|>"},
        "added_tokens": LEGACY,
    },
    "legacy": {"tokenizer_config": {"add_bos_token": True, "legacy": True, "added_tokens_decoder": DECODER}},
    "eos behind a text": {
        "tokenizer_config": {"add_bos_token": True, "add_eos_token": True, "added_tokens_decoder": DECODER}
    },
    "listed only": {
        "tokenizer_config": {
            "add_bos_token": False,
            "eos_token": "</s>",
            "additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<tool>"],
        }
    },
}


def write(directory: Path, content: bytes, **json_files: Any) -> Path:
    (directory / "tokenizer.model").write_bytes(content)
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    json_files["tokenizer_config"] = {"tokenizer_class": "LlamaTokenizer"} | json_files.get("tokenizer_config", {})
    for name, value in json_files.items():
        (directory / f"{name}.json").write_text(json.dumps(value))
    return directory


def reference_of(directory: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory)


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write(tmp_path, sentencepiece_file(), **LAYOUTS[request.param])


def test_ids_are_transformers(layout: Path) -> None:
    """Texts in which special tokens are tokens, as templates have them; and the hard strings, where they are text."""
    ours, reference = load_tokenizer(layout), reference_of(layout)
    for text in TEXTS:
        assert ours.encode_with_specials(text) == reference.encode(text, add_special_tokens=False), text
    for text in (*TEXTS, *hard_strings()[::4]):
        assert ours.encode(text) == reference.encode(text, split_special_tokens=True), text
    assert ours.vocab_size == len(reference) == SIZE + 3


def test_a_chat_is_transformers(layout: Path) -> None:
    ours, reference = load_tokenizer(layout), reference_of(layout)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " quick\n brown  fox "}]
    want = reference.apply_chat_template(
        messages, chat_template=CHATML, add_generation_prompt=True, return_dict=False, tokenize=True
    )
    assert ChatTemplate(CHATML).encode(ours, messages) == want


def test_answers_are_transformers_and_every_token_has_its_bytes(layout: Path) -> None:
    ours, reference = load_tokenizer(layout), reference_of(layout)
    for text in TEXTS:
        ids = reference.encode(text, add_special_tokens=False)
        assert ours.decode_bytes(ids).decode() == reference.decode(ids, skip_special_tokens=True)
        if not text.startswith("<"):
            assert ours.decode_bytes(ids, keep_specials=True).decode() == reference.decode(ids)
    for name, token_id in LEGACY.items():
        want = reference.convert_tokens_to_ids(name)
        assert ours.token_bytes(want, keep_specials=True).decode() == name
        assert reference.convert_ids_to_tokens(token_id) in LEGACY


def test_the_named_eos_ends_an_answer(tmp_path: Path) -> None:
    write(tmp_path, sentencepiece_file(), **LAYOUTS["a named eos"])
    ours = load_tokenizer(tmp_path)
    assert (ours.bos_id, ours.eos_ids) == (1, {SIZE + 1})
    write(tmp_path, sentencepiece_file(), **LAYOUTS["added_tokens.json"])
    assert load_tokenizer(tmp_path).eos_ids == {2}


@pytest.mark.parametrize("pieces", [{"control_symbols": ["<|im_start|>"]}, {"user_defined_symbols": ["<|im_start|>"]}])
def test_tokens_that_the_model_holds_change_nothing(tmp_path: Path, pieces: dict[str, Any]) -> None:
    content = sentencepiece_file(**pieces)
    at = read_piece_table(content).pieces.index("<|im_start|>")
    decoder = {str(at): token("<|im_start|>", special="control_symbols" in pieces)}
    config = {"added_tokens_decoder": DECODER | decoder, "pad_token": "[PAD]"}
    for added in (str(SIZE), str(SIZE + 1), str(SIZE + 2)):
        del config["added_tokens_decoder"][added]  # type: ignore[attr-defined]
    ours = load_tokenizer(write(tmp_path, content, tokenizer_config=config))
    reference = reference_of(tmp_path)
    for text in (*TEXTS, *hard_strings()[::20]):
        assert ours.encode_with_specials(text) == reference.encode(text, add_special_tokens=False), text
        assert ours.encode(text, add_bos=False) == reference.encode(
            text, add_special_tokens=False, split_special_tokens=True
        )


def test_a_model_without_a_class_is_metas_own(tmp_path: Path) -> None:
    """Their code and Mistral's encode each text between two control tokens as one of its own."""
    import sentencepiece

    (tmp_path / "tokenizer.model").write_bytes(content := sentencepiece_file())
    ours, model = load_tokenizer(tmp_path), sentencepiece.SentencePieceProcessor(model_proto=content)
    assert isinstance(ours, SentencePieceTokenizer)
    assert ours.encode_with_specials("<s>quick</s> fox") == [1, *model.encode("quick"), 2, *model.encode(" fox")]


@pytest.mark.parametrize(
    ("options", "added", "reason"),
    [
        ({"model_type": "unigram", "hard_vocab_limit": False}, LEGACY, "is no BPE"),
        ({"remove_extra_whitespaces": True}, LEGACY, "removes repeated spaces"),
        ({"normalization_rule_name": "nfkc"}, LEGACY, "normalizes characters"),
        ({}, {"<|im_start|>": SIZE + 7}, f"'<|im_start|>' has the id {SIZE + 7}, but the vocabulary makes it {SIZE}"),
        ({}, {"<|im_start|>": "first"}, "'first' is no token id"),
    ],
)
def test_what_cannot_be_kept_is_refused_by_name(
    tmp_path: Path, options: dict[str, Any], added: dict[str, Any], reason: str
) -> None:
    write(tmp_path, sentencepiece_file(**options), added_tokens=added)
    with pytest.raises(TokenizerError) as caught:
        load_tokenizer(tmp_path)
    assert reason in str(caught.value) and "\n" not in str(caught.value)


def test_a_decoder_entry_that_is_no_token() -> None:
    with pytest.raises(ValueError, match="is no token"):
        read_added_tokens({"added_tokens_decoder": {"5": 7}}, {}, {})


def test_the_piece_table_is_the_librarys() -> None:
    import sentencepiece

    content = sentencepiece_file(control_symbols=["<c>"], user_defined_symbols=["<u>"], add_dummy_prefix=False)
    model, table = sentencepiece.SentencePieceProcessor(model_proto=content), read_piece_table(content)
    ids = range(model.get_piece_size())
    assert list(table.pieces) == [model.id_to_piece(i) for i in ids]
    assert [kind == 3 for kind in table.kinds] == [model.is_control(i) for i in ids]
    assert [kind == 6 for kind in table.kinds] == [model.is_byte(i) for i in ids]
    assert (table.is_bpe, table.has_charsmap, table.removes_spaces, table.begins_with_space) == (True, *[False] * 3)


# --------------------------------------------------------------------- beside a tokenizer.json

OWN = special("<|begin|>", "<|end|>", "<tool>")
EXTRA: dict[str, dict[str, Any]] = {
    "one more": {"added_tokens_decoder": {"403": token("<|im_end|>", special=True), "404": token("<x>", lstrip=True)}},
    "other flags": {"added_tokens_decoder": {"402": token("<tool>", rstrip=True), "401": token("<|end|>")}},
    "named": {"eos_token": "<|im_end|>", "bos_token": "<|begin|>"},
    "named, ordinary in the vocabulary": {"eos_token": "th"},
    "listed": {"additional_special_tokens": ["<|im_end|>", "<tool>"]},
    "listed, another way": {"extra_special_tokens": {"image_token": "<|image|>"}},
    "special after all": {"added_tokens_decoder": {"402": token("<tool>", special=True)}, "eos_token": "<|end|>"},
}


@pytest.mark.parametrize("name", EXTRA)
def test_files_beside_a_tokenizer_json_add_what_it_lacks(tmp_path: Path, name: str) -> None:
    own = [*OWN[:2], Special("<tool>", {"special": False})]
    (tmp_path / "tokenizer.json").write_text(json.dumps(bytes_json("llama3", own, bos="<|begin|>")))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **EXTRA[name]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    ours, reference = load_tokenizer(tmp_path), reference_of(tmp_path)
    for text in ("a <tool> b <|im_end|> c<|end|> d <x> e<|image|>", *TEXTS, "the other"):
        assert ours.encode_with_specials(text) == reference.encode(text, add_special_tokens=False), text
        assert ours.encode(text) == reference.encode(text, split_special_tokens=True), text
    assert ours.vocab_size == len(reference)


def test_an_added_id_that_the_vocabulary_does_not_give_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(bytes_json("llama3", OWN)))
    config = {"added_tokens_decoder": {"500": token("<far>", special=True)}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: added token '<far>' has the id 500, .* makes it 403$"):
        load_tokenizer(tmp_path)


def test_tokens_beside_a_llama_3_file_are_its_own_or_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(rank_file())
    for content, token_id, known in (("<|eot_id|>", 409, True), ("<|im_end|>", 656, False), ("<|eot_id|>", 5, False)):
        config = {"added_tokens_decoder": {str(token_id): token(content, special=True)}}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        if known:
            assert load_tokenizer(tmp_path).encode_with_specials(content) == [token_id]
            continue
        with pytest.raises(TokenizerError, match=r"do not have '<\|[a-z_]+\|>', which the JSON files beside it add"):
            load_tokenizer(tmp_path)
