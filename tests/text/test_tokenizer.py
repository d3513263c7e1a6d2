"""Tokenizers are the reference libraries', byte for byte and both ways, on 2,000 hard strings; and streams add up."""

import base64
import codecs
import functools
import json
import random
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt_fast.config import ConfigError
from gpt_fast.text.gguf_tokenizer import SPLITS, tokenizer_json_from_gguf
from gpt_fast.text.hugging_face_tokenizer import HuggingFaceTokenizer
from gpt_fast.text.llama3_tokenizer import cut_long_runs
from gpt_fast.text.load_tokenizer import load_tokenizer
from gpt_fast.text.token_bytes import BYTE_OF
from gpt_fast.text.tokenizer import Tokenizer, TokenizerError
from support.examples import examples
from support.hard_strings import MISTRAL_COMMON, SMOLLM2_GGUF, download, hard_strings, wheel_member
from support.tiny_tokenizers import bytes_json
from support.tokenizer_files import CORPUS, rank_file

SPIECE = {
    "v1": "mistral_common/data/tokenizer.model.v1",
    "v3": "mistral_common/data/mistral_instruct_tokenizer_240323.model.v3",
}


class Pair(NamedTuple):
    """A tokenizer of ours and its reference's two directions."""

    ours: Tokenizer
    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    unlike: frozenset[int] = frozenset()  # ids that the two libraries spell differently, in no text's encoding


def directory_with(path: Path, name: str, content: bytes, **json_files: Any) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / name).write_bytes(content)
    for file, value in json_files.items():
        (path / f"{file}.json").write_text(json.dumps(value))
    return path


@functools.cache
def smollm2_content() -> tuple[bytes, str]:
    """tokenizer.json of the published GGUF: ours, and the one inside transformers' tokenizer from the same file."""
    from transformers import AutoTokenizer

    from gpt_fast.convert.gguf import GgufSource

    gguf = download(SMOLLM2_GGUF)
    reference = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    return tokenizer_json_from_gguf(GgufSource(gguf).metadata), reference.backend_tokenizer.to_str()


def smollm2(path: Path, *, digits: bool = True) -> Pair:
    """The published GGUF. digits: transformers does not know that "smollm" takes digits one by one, as the published
    tokenizer.json and llama.cpp do, so that is put before its own cutting."""
    import tokenizers

    ours, theirs = smollm2_content()
    reference = tokenizers.Tokenizer.from_str(theirs)
    reference.encode_special_tokens = True  # the library's word for "special tokens are text"
    if digits:
        steps = [tokenizers.pre_tokenizers.Digits(individual_digits=True), reference.pre_tokenizer]
        reference.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(steps)
    return Pair(
        load_tokenizer(directory_with(path, "tokenizer.json", ours)),
        lambda text: reference.encode(text, add_special_tokens=False).ids,
        lambda ids: reference.decode(ids, skip_special_tokens=True),
    )


def sentencepiece_model(name: str) -> Any:
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_proto=wheel_member(MISTRAL_COMMON, SPIECE[name]))


def spiece(path: Path, name: str) -> Pair:
    model = sentencepiece_model(name)
    content = wheel_member(MISTRAL_COMMON, SPIECE[name])
    return Pair(load_tokenizer(directory_with(path, "tokenizer.model", content)), model.encode, model.decode)


def spiece_metadata(model: Any) -> dict[str, Any]:
    """What llama.cpp writes into a GGUF for a SentencePiece model."""
    ids = range(model.get_piece_size())
    kinds = [(model.is_unknown, 2), (model.is_control, 3), (model.is_byte, 6)]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [model.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": [model.get_score(i) for i in ids],
        "tokenizer.ggml.token_type": [next((kind for test, kind in kinds if test(i)), 1) for i in ids],
        "tokenizer.ggml.bos_token_id": model.bos_id(),
        "tokenizer.ggml.eos_token_id": model.eos_id(),
        "tokenizer.ggml.unknown_token_id": model.unk_id(),
    }


def spiece_gguf(path: Path, name: str) -> Pair:
    """A GGUF's SentencePiece vocabulary, against SentencePiece itself. SentencePiece spells the unknown token " ⁇ ",
    `tokenizers` nothing; and only the latter drops a first space that is spelled as a byte."""
    model = sentencepiece_model(name)
    content = tokenizer_json_from_gguf(spiece_metadata(model))
    directory_with(path, "tokenizer.json", content, tokenizer_config={"bos_token": "<s>", "eos_token": "</s>"})
    unlike = frozenset([model.unk_id(), model.piece_to_id("<0x20>")])
    return Pair(load_tokenizer(path), model.encode, model.decode, unlike)


def llama3(path: Path) -> Pair:
    """Against transformers' conversion of the same file to the `tokenizers` library: none of tiktoken's own code."""
    from transformers.convert_slow_tokenizer import TikTokenConverter

    directory_with(path, "tokenizer.model", rank_file())
    reference = TikTokenConverter(vocab_file=str(path / "tokenizer.model")).converted()
    return Pair(
        load_tokenizer(path),
        lambda text: reference.encode(text, add_special_tokens=False).ids,
        lambda ids: reference.decode([i for i in ids if i < 400]),
    )


MAKERS: dict[str, Callable[[Path], Pair]] = {
    "smollm2": smollm2,
    "sentencepiece-v1": lambda path: spiece(path, "v1"),
    "sentencepiece-v3": lambda path: spiece(path, "v3"),
    "gguf-of-v1": lambda path: spiece_gguf(path, "v1"),
    "gguf-of-v3": lambda path: spiece_gguf(path, "v3"),
    "llama3": llama3,
}
NAMES = [name if name == "llama3" else pytest.param(name, marks=pytest.mark.model) for name in MAKERS]


@pytest.fixture(scope="module", params=NAMES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return MAKERS[request.param](tmp_path_factory.mktemp(request.param))


def valid(text: str) -> bool:
    """Whether every byte became a character, so that a reference's text is the bytes."""
    return "\ufffd" not in text


# --------------------------------------------------------------------- byte-exact, in both directions


@pytest.mark.slow
def test_two_thousand_hard_strings(pair: Pair) -> None:
    strings = hard_strings()
    assert len(strings) == 2000
    for text in strings:
        ids = pair.encode(text)
        assert pair.ours.encode(text, add_bos=False) == ids
        assert pair.ours.decode(ids) == pair.decode(ids)
        assert pair.ours.decode_bytes(ids).decode(errors="replace") == pair.decode(ids)  # some bytes have no token
        assert not set(pair.ours.control_tokens) & {
            pair.ours.token_bytes(i, keep_specials=True).decode(errors="replace")
            for i in ids
            if not pair.ours.token_bytes(i)
        }


@given(text=st.text(max_size=60))
def test_any_text(pair: Pair, text: str) -> None:
    ids = pair.ours.encode(text, add_bos=False)
    assert ids == pair.encode(text)
    assert pair.ours.decode_bytes(ids).decode(errors="replace") == pair.decode(ids)


@examples(300)
@given(data=st.data())
def test_bytes_of_any_ids_are_the_reference_text(pair: Pair, data: st.DataObject) -> None:
    likely = st.integers(0, pair.ours.vocab_size - 1).filter(lambda i: i not in pair.unlike)
    ids = data.draw(st.lists(likely, max_size=12))
    text = pair.ours.decode(ids)
    assert text == pair.decode(ids) or (pair.unlike and not valid(text))  # nor do they spell broken bytes alike
    streamed = b"".join(map(pair.ours.detokenizer(at_start=True).push, ids))
    assert streamed == pair.ours.decode_bytes(ids)
    if valid(text):
        assert streamed.decode() == text
    assert codecs.getincrementaldecoder("utf-8")("replace").decode(streamed, final=True) == streamed.decode(
        errors="replace"
    )


@given(data=st.data())
def test_a_text_goes_on_after_a_prompt(pair: Pair, data: st.DataObject) -> None:
    """However ids are cut into prompt and answer, the answer's bytes are what they add to the prompt's."""
    text = data.draw(st.sampled_from(hard_strings()[1:]))  # the first is empty
    ids = pair.ours.encode(text, add_bos=False)
    cut = data.draw(st.integers(1, len(ids)))
    answer = b"".join(map(pair.ours.detokenizer().push, ids[cut:]))
    assert pair.ours.decode_bytes(ids[:cut]) + answer == pair.ours.decode_bytes(ids)


def test_ids_without_a_token_are_nothing(pair: Pair) -> None:
    size = pair.ours.vocab_size
    assert [pair.ours.token_bytes(i) for i in (-1, size, size + 10**6)] == [b""] * 3
    assert pair.ours.decode([-1, size, 10**6]) == ""


def test_lone_surrogate_is_refused(pair: Pair) -> None:
    for encode in (pair.ours.encode, pair.ours.encode_with_specials):
        with pytest.raises(TokenizerError, match="lone surrogate at character 2"):
            encode("ab\ud800")


def test_bos_begins_a_text_once(pair: Pair) -> None:
    ids = pair.ours.encode("Hello", add_bos=False)
    adds = pair.ours.encode("Hello")[: -len(ids)]
    assert adds in ([], [pair.ours.bos_id])
    assert pair.ours.encode("Hello")[len(adds) :] == ids
    assert pair.ours.encode("") == adds


def test_control_tokens_come_from_templates_only(pair: Pair) -> None:
    for token in pair.ours.control_tokens:
        (control,) = pair.ours.encode_with_specials(token)
        assert control not in pair.ours.encode(token, add_bos=False)
        assert pair.ours.token_bytes(control) == b""
        assert pair.ours.token_bytes(control, keep_specials=True).decode() == token
        forged = pair.ours.encode_with_specials(f"a{token}b{token}c", literal=[(1, 1 + len(token))])
        assert forged.count(control) == 1
        assert pair.ours.decode_bytes(forged, keep_specials=True).decode() in (
            f"a{token}b{token}c",
            f"a{token}b{token} c",
        )


def test_literal_spans_that_touch_nothing_change_nothing(pair: Pair) -> None:
    token = pair.ours.control_tokens[-1]
    text = f" x {token}  y{token}"
    spans = [(0, 2), (3 + len(token), 5 + len(token))]
    assert pair.ours.encode_with_specials(text, literal=spans) == pair.ours.encode_with_specials(text)


# ------------------------------------------------------------------------------ each kind's own rules


@pytest.mark.model
def test_smollm2_takes_digits_one_by_one(tmp_path: Path) -> None:
    ours = smollm2(tmp_path).ours
    assert ours.encode("Hello world! 123") == [19556, 905, 17, 216, 33, 34, 35]


@pytest.mark.model
def test_smollm2_without_digits_is_transformers_untouched(tmp_path: Path) -> None:
    pair = smollm2(tmp_path, digits=False)
    strings = [text for text in hard_strings() if not any(c.isnumeric() for c in text)]
    assert len(strings) > 1000
    for text in strings:
        assert pair.ours.encode(text) == pair.encode(text)


@pytest.mark.parametrize("drops", [True, False])
@pytest.mark.parametrize("collapses", [True, False])
def test_sentencepiece_space_rules(tmp_path: Path, drops: bool, collapses: bool) -> None:
    """Trained with every combination of the two normalizer flags; OpenLLaMA's collapses spaces, Llama's does not."""
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, vocab_size=420, model_type="bpe", byte_fallback=True,
        add_dummy_prefix=drops, remove_extra_whitespaces=collapses, normalization_rule_name="identity",
        minloglevel=2, character_coverage=0.99, user_defined_symbols=["<sep>"],
    )  # fmt: skip
    reference = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    ours = load_tokenizer(directory_with(tmp_path, "tokenizer.model", model.getvalue()))
    rng = random.Random(0)
    for text in hard_strings()[::5]:
        assert ours.encode(text, add_bos=False) == reference.encode(text)
    for _ in range(2000):
        ids = [rng.choice([rng.randrange(420), rng.randrange(260, 300), reference.piece_to_id("▁")]) for _ in range(6)]
        if valid(reference.decode(ids)):
            assert ours.decode_bytes(ids).decode() == reference.decode(ids)


def test_llama3_table(tmp_path: Path) -> None:
    ours = llama3(tmp_path).ours
    assert ours.vocab_size == 400 + 256
    assert ours.bos_id == 400
    assert ours.eos_ids == {401, 408, 409}
    assert [ours.token_bytes(400 + n, keep_specials=True).decode() for n in (0, 6, 9, 12, 255)] == [
        *("<|begin_of_text|>", "<|start_header_id|>", "<|eot_id|>", "<|reserved_special_token_2|>"),
        "<|reserved_special_token_245|>",
    ]


def test_llama3_long_runs_are_cut() -> None:
    """tiktoken's own stack gives way on very long words; the cuts are where Meta's code makes them."""
    text = "a" * 25_001 + " " * 60_000 + "b" * 25_000
    assert [len(part) for part in cut_long_runs(text)] == [25_000, 25_001, 25_000, 35_000]
    assert [len(part) for part in cut_long_runs("ab " * 300_000)] == [400_000, 400_000, 100_000]
    assert list(cut_long_runs("")) == []


def test_facts_from_the_files_beside(tmp_path: Path) -> None:
    content = tokenizer_json_from_gguf(byte_fields())
    config = {"bos_token": {"content": "<a>", "lstrip": False}, "eos_token": "<b>", "add_bos_token": True}
    directory_with(
        tmp_path, "tokenizer.json", content, tokenizer_config=config, generation_config={"eos_token_id": [7, 9]}
    )
    ours = load_tokenizer(tmp_path)
    assert (ours.bos_id, ours.eos_ids) == (256, {257, 7, 9})
    directory_with(tmp_path, "tokenizer.json", content, tokenizer_config={}, generation_config={"eos_token_id": 8})
    assert (load_tokenizer(tmp_path).bos_id, load_tokenizer(tmp_path).eos_ids) == (None, {8})


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
PROMPTS = {"none": None, "byte level": BYTE_LEVEL, "sequence": {"type": "Sequence", "processors": [BYTE_LEVEL]}}
FLAGS = [{}, {"add_bos_token": True}, {"add_bos_token": False}, {"add_bos_token": True, "add_eos_token": True}]


def text_template() -> dict[str, Any]:
    from tokenizers.processors import TemplateProcessing

    return json.loads(TemplateProcessing(single="<a> $A", pair="$A $B", special_tokens=[("<a>", 256)]).__getstate__())


def with_post_processor(path: Path, post_processor: Any, **config: Any) -> Path:
    content = json.loads(tokenizer_json_from_gguf(byte_fields())) | {"post_processor": post_processor}
    config = {"bos_token": "<a>", "eos_token": "<b>", **config}
    directory_with(path, "tokenizer.json", json.dumps(content).encode(), tokenizer_config=config)
    (path / "config.json").write_text('{"model_type": "qwen2"}')
    return path


@pytest.mark.parametrize("tokenizer_class", ["LlamaTokenizerFast", "LlamaTokenizer", "Qwen2Tokenizer", None])
@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_a_post_processors_own_template_holds(tmp_path: Path, tokenizer_class: str | None, flags: Any) -> None:
    """As in transformers 5, whatever tokenizer_config.json says."""
    from transformers import AutoTokenizer

    processors = [text_template(), {"type": "Sequence", "processors": [BYTE_LEVEL, text_template()]}]
    for processor in processors:
        named = {} if tokenizer_class is None else {"tokenizer_class": tokenizer_class}
        with_post_processor(tmp_path, processor, **named, **flags)
        assert load_tokenizer(tmp_path).encode("hi") == AutoTokenizer.from_pretrained(tmp_path).encode("hi")


@pytest.mark.parametrize("processor", PROMPTS)
@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_the_llama_class_puts_tokens_where_no_template_does(tmp_path: Path, processor: str, flags: Any) -> None:
    """DeepSeek-R1-Distill-Qwen. Other classes leave it at the post-processor, as transformers does."""
    from transformers import AutoTokenizer

    with_post_processor(tmp_path, PROMPTS[processor], tokenizer_class="LlamaTokenizerFast", **flags)
    around = [[256] * flags.get("add_bos_token", False), [257] * flags.get("add_eos_token", False)]
    assert load_tokenizer(tmp_path).encode("hi") == [*around[0], 71, 72, *around[1]]
    assert load_tokenizer(tmp_path).encode("hi", add_bos=False) == [71, 72]
    with_post_processor(tmp_path, PROMPTS[processor], tokenizer_class="Qwen2Tokenizer", **flags)
    assert load_tokenizer(tmp_path).encode("hi") == AutoTokenizer.from_pretrained(tmp_path).encode("hi")


@pytest.mark.parametrize("flags", [{"add_bos_token": True}, {"add_bos_token": False}, {"add_eos_token": True}], ids=str)
def test_sentencepiece_takes_the_flags(tmp_path: Path, flags: Any) -> None:
    import io

    import sentencepiece
    from transformers import AutoTokenizer

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, vocab_size=420, model_type="bpe", byte_fallback=True,
        remove_extra_whitespaces=False, normalization_rule_name="identity", minloglevel=2, character_coverage=0.99,
    )  # fmt: skip
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, **flags}
    directory_with(tmp_path, "tokenizer.model", model.getvalue(), tokenizer_config=config)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert load_tokenizer(tmp_path).encode("quick") == AutoTokenizer.from_pretrained(tmp_path).encode("quick")


class Slow:
    """A backend on which a thread always waits between setting the mode and encoding."""

    def __init__(self, backend: Any) -> None:
        self.__dict__["backend"] = backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.backend, name, value)
        time.sleep(0.001)


def test_threads_do_not_see_each_others_mode(tmp_path: Path) -> None:
    ours = load_tokenizer(directory_with(tmp_path, "tokenizer.json", tokenizer_json_from_gguf(byte_fields())))
    assert isinstance(ours, HuggingFaceTokenizer)
    ours._backend = Slow(ours._backend)
    got: dict[bool, list[list[int]]] = {True: [], False: []}

    def work(special: bool) -> None:
        for _ in range(50):
            got[special].append(ours.encode_with_specials("<a>") if special else ours.encode("<a>"))

    threads = [threading.Thread(target=work, args=(special,)) for special in (True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got[True] == [[256]] * 50
    assert [256] not in got[False]


# --------------------------------------------------------------------------------- GGUF vocabularies


def byte_fields(**changes: Any) -> dict[str, Any]:
    """A GGUF's metadata: the bytes, two control tokens, one user-defined."""
    fields = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": [*BYTE_OF, "<a>", "<b>", "  think"],
        "merges": [],
        "token_type": [1] * 256 + [3, 3, 4],
        "bos_token_id": 256,
        "eos_token_id": 257,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in {**fields, **changes}.items() if value is not None}


@pytest.mark.parametrize("pre", [*SPLITS])
def test_every_pre_tokenizer_gives_back_the_text(tmp_path: Path, pre: str) -> None:
    directory_with(tmp_path, "tokenizer.json", tokenizer_json_from_gguf(byte_fields(pre=pre)))
    ours = load_tokenizer(tmp_path)
    for text in hard_strings()[::4]:
        assert ours.decode_bytes(ours.encode(text, add_bos=False)).decode() == text


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("gpt-2", "I'm 12345 ok!!\n", ["I", "'m", " 12345", " ok", "!!", "\n"]),
        ("smollm", "I'm 123 ok", ["I", "'m", " ", "1", "2", "3", " ok"]),
        ("llama-bpe", "I'M 12345 ok!!\n", ["I", "'M", " ", "123", "45", " ok", "!!\n"]),
        ("qwen2", "I'M 123 ok!!\n", ["I", "'M", " ", "1", "2", "3", " ok", "!!\n"]),
        ("tekken", "helloWorld 12/\n", ["hello", "World", " ", "1", "2", "/\n"]),
        ("default", "a=12345!?", ["a", "=", "123", "45", "!?"]),
    ],
)
def test_pre_tokenizers_cut(pre: str, text: str, pieces: list[str]) -> None:
    import tokenizers

    backend = tokenizers.Tokenizer.from_str(tokenizer_json_from_gguf(byte_fields(pre=pre)).decode())
    assert [text[a:b] for _, (a, b) in backend.pre_tokenizer.pre_tokenize_str(text)] == pieces


PUBLISHED_CUTS = {"gpt-2": "gpt2", "smollm": "smollm", "refact": "smollm", "qwen2": "qwen2", "llama-bpe": "llama3",
                  "deepseek-coder": "deepseek", "dbrx": "llama3", "tekken": "tekken"}  # fmt: skip


@pytest.mark.parametrize("pre", PUBLISHED_CUTS)
def test_pre_tokenizers_cut_as_the_published_files(pre: str) -> None:
    """llama.cpp's name of a pre-tokenizer stands for the one of a published tokenizer.json."""
    import tokenizers

    published = tokenizers.Tokenizer.from_str(json.dumps(bytes_json(PUBLISHED_CUTS[pre], []))).pre_tokenizer
    ours = tokenizers.Tokenizer.from_str(tokenizer_json_from_gguf(byte_fields(pre=pre)).decode()).pre_tokenizer
    for text in hard_strings()[::5]:
        assert ours.pre_tokenize_str(text) == published.pre_tokenize_str(text), text


def test_gguf_bos_as_the_file_or_llama_cpp_says(tmp_path: Path) -> None:
    def begins(**changes: Any) -> list[int]:
        directory_with(tmp_path, "tokenizer.json", tokenizer_json_from_gguf(byte_fields(**changes)))
        return load_tokenizer(tmp_path).encode("")

    assert begins() == []
    assert begins(add_bos_token=True) == [256]
    assert begins(pre="llama-bpe") == [256]
    assert begins(pre="llama-bpe", add_bos_token=False) == []
    assert begins(add_bos_token=True, add_eos_token=True) == [256, 257]


def test_user_defined_tokens_are_found_in_any_text(tmp_path: Path) -> None:
    directory_with(tmp_path, "tokenizer.json", tokenizer_json_from_gguf(byte_fields()))
    ours = load_tokenizer(tmp_path)
    assert ours.control_tokens == ("<a>", "<b>")
    assert ours.encode("x  think<a>")[1:2] == [258]
    assert ours.decode_bytes(ours.encode("x  think<a>")) == b"x  think<a>"


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"model": "bert"}, r"tokenizer\.ggml\.model: .*'bert'"),
        ({"model": None}, r"tokenizer\.ggml\.model: "),
        ({"pre": "viking"}, r"tokenizer\.ggml\.pre: .*'viking'"),
        ({"pre": None}, r"tokenizer\.ggml\.pre: "),
        ({"tokens": None}, r"tokenizer\.ggml\.tokens: "),
        ({"tokens": ["a", "a"]}, r"tokenizer\.ggml\.tokens: has the same token"),
        ({"tokens": "abc"}, r"tokenizer\.ggml\.tokens: "),
        ({"merges": None}, r"tokenizer\.ggml\.merges: "),
        ({"merges": ["x"]}, r"tokenizer\.ggml: is no usable vocabulary"),
        ({"merges": ["a b"]}, r"tokenizer\.ggml: is no usable vocabulary"),
        ({"token_type": None}, r"tokenizer\.ggml\.token_type: "),
        ({"bos_token_id": 999, "add_bos_token": True}, r"tokenizer\.ggml\.bos_token_id: .*999"),
        ({"precompiled_charsmap": b"x"}, r"tokenizer\.ggml\.precompiled_charsmap: "),
        ({"model": "llama"}, r"tokenizer\.ggml\.unknown_token_id: "),
        ({"model": "llama", "unknown_token_id": 0, "scores": [0.0]}, r"tokenizer\.ggml: has 259 tokens, 1 scores"),
    ],
)
def test_gguf_that_cannot_be_kept_is_refused_by_key(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{key}[^\n]*$"):
        tokenizer_json_from_gguf(byte_fields(**changes))


# ------------------------------------------------------------------------------------- refused files


def test_no_tokenizer_names_the_directory(tmp_path: Path) -> None:
    with pytest.raises(
        TokenizerError, match=r"no tokenizer \(looked for tokenizer\.json, tokenizer\.model, vocab"
    ) as error:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"model": {"type": "Magic"}}', b"\xff\xfe", b"null"])
def test_broken_tokenizer_json(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: [^\n]+$"):
        load_tokenizer(directory_with(tmp_path, "tokenizer.json", content))


LINES = [base64.b64encode(bytes([b])) + b" %d" % b for b in range(256)]


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"\0", b"\n\x0ejunk", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        b"\n".join(LINES[:200]),  # bytes missing
        b"\n".join(LINES[:100] + LINES[101:]),  # a hole
        b"\n".join([*LINES, b"!!! 256"]),
        b"\n".join([*LINES, b"YWI= x"]),
        b"\n".join([*LINES, b"YWI="]),
        b"\n".join([*LINES, LINES[7]]),  # twice
    ],
)
def test_broken_tokenizer_model(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer\.model: [^\n]+$"):
        load_tokenizer(directory_with(tmp_path, "tokenizer.model", content))


def test_broken_side_file(tmp_path: Path) -> None:
    directory_with(tmp_path, "tokenizer.json", tokenizer_json_from_gguf(byte_fields()))
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json: is not readable JSON"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("decoder", [None, {"type": "WordPiece", "prefix": "##", "cleanup": True}, {"type": "Fuse"}])
def test_unknown_decoder_is_refused_by_name(tmp_path: Path, decoder: Any) -> None:
    content = {**json.loads(tokenizer_json_from_gguf(byte_fields())), "decoder": decoder}
    with pytest.raises(TokenizerError, match="decoder is not supported") as error:
        load_tokenizer(directory_with(tmp_path, "tokenizer.json", json.dumps(content).encode()))
    assert decoder is None or decoder["type"] in str(error.value)


@pytest.mark.model
def test_no_text_has_fewer_tokens_than_its_characters_allow() -> None:
    tokenizer = load_tokenizer(Path("checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct"))
    most = tokenizer.characters_per_token
    assert most is not None and most > 10
    for text in [*hard_strings(), " " * 5000, "-" * 5000, "\n" * 999]:
        assert len(text) <= most * len(tokenizer.encode(text, add_bos=False))
        assert len(text) <= most * len(tokenizer.encode(text, add_bos=False, specials=True))


def test_a_tokenizer_that_shortens_texts_has_no_bound() -> None:
    import tokenizers

    from gpt_fast.text.hugging_face_tokenizer import characters_per_token

    backend = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "bbb": 1}, []))
    assert characters_per_token(backend) == 3
    backend.normalizer = tokenizers.normalizers.NFC()
    assert characters_per_token(backend) == 12
    backend.normalizer = tokenizers.normalizers.Strip()
    assert characters_per_token(backend) is None
    backend.normalizer = tokenizers.normalizers.Replace(" ", "\u2581")
    assert characters_per_token(backend) == 3
    backend.add_tokens([tokenizers.AddedToken("<x>", rstrip=True)])
    assert characters_per_token(backend) is None


@pytest.mark.model
@pytest.mark.parametrize("specials", [False, True])
def test_others_run_while_a_long_text_is_encoded(specials: bool) -> None:
    """The library's call for one text keeps Python's lock: no stream would get a token for a second."""
    tokenizer = load_tokenizer(Path("checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct"))
    text = "the capital of France is " * 20_000
    encoding = threading.Thread(target=tokenizer.encode, args=(text,), kwargs={"specials": specials})
    encoding.start()
    turns = 0
    while encoding.is_alive():
        time.sleep(0.001)
        turns += 1
    assert turns > 10
