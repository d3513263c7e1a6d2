"""Layouts of the models people run: each converts and equals transformers in ids, template text and logits, or is
refused by name. The table is support/layouts.py."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpt_fast.checkpoint.safetensors_file import CheckpointError
from gpt_fast.config import ConfigError
from gpt_fast.convert.hf import open_job
from gpt_fast.convert.run import convert
from gpt_fast.load.checkpoint import load_checkpoint
from gpt_fast.text.chat import load_chat_template
from gpt_fast.text.load_tokenizer import load_tokenizer
from gpt_fast.text.tokenizer import TokenizerError
from support.hard_strings import TRL, hard_strings, wheel_member
from support.layouts import LAYOUTS, Layout
from support.tiny_models import decided, logits

pytestmark = pytest.mark.slow  # together: each takes a quarter of a second
WEIGHTS = "model.safetensors"
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " quick\n brown  fox? "},
    {"role": "assistant", "content": "Lazy dog."},
    {"role": "user", "content": "x ** 2"},
]


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_is_transformers_or_refused_by_name(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    layout, hf, out = LAYOUTS[name], tmp_path / "hf", tmp_path / "out"
    write_files(layout, hf)
    reference = write_weights(layout, hf) if layout.refused is None else None
    with caplog.at_level(logging.WARNING):
        if reference is None:
            save_file({"model.norm.weight": torch.ones(4)}, hf / WEIGHTS)
            with pytest.raises((CheckpointError, ConfigError, TokenizerError), match=str(layout.refused)):
                convert(open_job(hf), out, progress=False)
            return
        convert(open_job(hf), out, progress=False)
    passed = [record.args[1] for record in caplog.records if "is passed over" in record.message]  # type: ignore[index]
    assert passed == list(layout.passed)
    if layout.tokenizer is not None:
        check_ids(layout, hf, out)
        if layout.template is not None:
            check_template(layout, hf, out)
    check_logits(reference, out)


# -------------------------------------------------------------------------------------------- as published


def write_files(layout: Layout, hf: Path) -> None:
    """Everything but the weights."""
    hf.mkdir()
    files = dict(layout.tokenizer.files()) if layout.tokenizer is not None else {}
    for name, content in files.items():
        write(hf / name, content)
    if layout.tokenizer is not None and layout.tokenizer.config:
        write(hf / "tokenizer_config.json", tokenizer_config(layout))
    ids = vocabulary(layout, hf)
    vocab_size = max(ids.values(), default=31) + 1 + layout.extra
    write(hf / "config.json", with_ids({**layout.config, "vocab_size": vocab_size}, ids))
    if layout.generation:
        write(hf / "generation_config.json", with_ids(layout.generation, ids))


def write(path: Path, content: bytes | dict[str, Any]) -> None:
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content, ensure_ascii=False).encode())


def tokenizer_config(layout: Layout) -> dict[str, Any]:
    assert layout.tokenizer is not None
    template = layout.template
    if isinstance(template, str) and template.endswith(".jinja"):
        template = wheel_member(TRL, f"trl/chat_templates/{template}").decode()
    return {**layout.tokenizer.config, **({"chat_template": template} if template is not None else {})}


def vocabulary(layout: Layout, hf: Path) -> dict[str, int]:
    """Spelling -> id, by our own reader: what it makes of them is held to transformers' later."""
    if layout.refused is not None or layout.tokenizer is None:
        return {}
    write(hf / "config.json", {"model_type": layout.config["model_type"]})
    ours = load_tokenizer(hf)
    return {ours.token_bytes(i, keep_specials=True).decode(errors="replace"): i for i in range(ours.vocab_size)}


def with_ids(values: dict[str, Any], ids: dict[str, int]) -> dict[str, Any]:
    def number(value: Any) -> Any:
        if isinstance(value, list):
            return [number(each) for each in value]
        return ids.get(value, 1) if isinstance(value, str) else value

    return {key: number(value) if key.endswith("_token_id") else value for key, value in values.items()}


def write_weights(layout: Layout, hf: Path) -> torch.nn.Module:
    """transformers' model of the config.json, its random weights cut as the layout says."""
    import transformers

    published = (hf / "config.json").read_bytes()
    config = transformers.AutoConfig.from_pretrained(hf)
    model = decided(transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float())
    shards = "40KB" if "shards" in layout.weights else "1GB"
    model.save_pretrained(hf, max_shard_size=shards)
    (hf / "config.json").write_bytes(published)
    if layout.generation == {}:
        (hf / "generation_config.json").unlink(missing_ok=True)
    cut(layout.weights, hf)
    return model


def cut(kind: str, hf: Path) -> None:
    index = hf / "model.safetensors.index.json"
    if "shards" in kind:
        assert index.is_file()
    if kind == "rotary":
        more = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(4) for n in range(2)}
        save_file(load_file(hf / WEIGHTS) | more, hf / WEIGHTS)
    if kind == "no model.":
        save_file({name.removeprefix("model."): t for name, t in load_file(hf / WEIGHTS).items()}, hf / WEIGHTS)
    if kind.startswith("bin"):
        for file in hf.glob("*.safetensors"):
            torch.save(load_file(file), hf / file.name.replace("model", "pytorch_model").replace("safetensors", "bin"))
            file.unlink()
        if index.is_file():
            text = index.read_text().replace("model-", "pytorch_model-").replace("safetensors", "bin")
            (hf / "pytorch_model.bin.index.json").write_text(text)
            index.unlink()
    if kind.endswith("without index"):
        for file in hf.glob("*.index.json"):
            file.unlink()


# ------------------------------------------------------------------------------------------------ equality


def reference_tokenizer(layout: Layout, hf: Path) -> Any:
    """transformers 5 rebuilds what tokenizer.json says with the rules of GPT2Tokenizer and Qwen2Tokenizer, and reads a
    tokenizer.model of Mistral's without the space before a text: where a layout says so, the file's own rules, or the
    class that tokenizer_config.json names, are right."""
    import transformers

    assert layout.tokenizer is not None
    if layout.reference == "auto":
        return transformers.AutoTokenizer.from_pretrained(hf)
    config = layout.tokenizer.config
    if layout.reference == "class":
        return getattr(transformers, config["tokenizer_class"]).from_pretrained(hf)
    reference = transformers.PreTrainedTokenizerFast.from_pretrained(hf)
    if config.get("add_bos_token"):
        reference.add_bos_token = True
    return reference


def check_ids(layout: Layout, hf: Path, out: Path) -> None:
    ours, reference = load_tokenizer(out), reference_tokenizer(layout, hf)
    assert ours.vocab_size == len(reference)
    specials = [str(token) for token in reference.added_tokens_decoder.values()]
    for name in specials:
        text = f"{name} hi {name}\n x{name}{name}  y"
        assert ours.encode_with_specials(text) == reference.encode(text, add_special_tokens=False), text
    for text in ("", "Hello", *hard_strings()[::60]):
        want = reference.encode(text, split_special_tokens=True)
        assert ours.encode(text) == want, text
        assert ours.decode_bytes(want).decode() == reference.decode(want, skip_special_tokens=True), text
    assert ours.bos_id == reference.bos_token_id
    if reference.eos_token_id is not None:
        assert reference.eos_token_id in ours.eos_ids


def check_template(layout: Layout, hf: Path, out: Path) -> None:
    ours, reference, template = load_tokenizer(out), reference_tokenizer(layout, hf), load_chat_template(out)
    assert template is not None
    for add_generation_prompt in (True, False):
        options = {"add_generation_prompt": add_generation_prompt}
        given = [template._template.with_content(message) for message in MESSAGES]  # type: ignore[union-attr]
        want = reference.apply_chat_template(given, tokenize=False, **options)
        assert template.render(MESSAGES, **options) == want
        ids = reference.apply_chat_template(given, tokenize=True, return_dict=False, **options)
        assert template.encode(ours, MESSAGES, **options) == ids


def check_logits(reference: torch.nn.Module, out: Path) -> None:
    loaded = load_checkpoint(out, device="cpu")
    tokens = torch.randint(0, loaded.config.vocab_size, (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = reference(tokens).logits
    got = logits(loaded, tokens, steps=3)
    assert (got - want).abs().max().item() < 1e-4
    assert torch.equal(got.argmax(-1), want.argmax(-1))


def test_the_corpus_is_wide() -> None:
    assert len(LAYOUTS) >= 85
    assert sum(layout.refused is None for layout in LAYOUTS.values()) >= 65
    assert {layout.config["model_type"] for layout in LAYOUTS.values()} > {
        "llama",
        "mistral",
        "mixtral",
        "qwen2",
        "qwen3",
        "phi3",
    }
