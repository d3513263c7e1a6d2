"""Our tables of config.json's keys are transformers': what its classes and modules read is read, inert or refused by
name, and what they ignore is passed over, each key named once in the log."""

from __future__ import annotations

import ast
import copy
import dataclasses
import functools
import inspect
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import modeling_rope_utils

from gpt_fast.checkpoint.hf_config import FAMILIES, FIXED, INERT, model_config_from_hf, passed_over
from gpt_fast.config import ConfigError
from gpt_fast.convert.hf import open_job
from gpt_fast.convert.run import convert
from gpt_fast.load.checkpoint import load_checkpoint
from support.tiny_models import SIZES, decided, logits

# What modules read of a config that is no key of a file: methods, and what code sets while a model runs.
NOT_KEYS = {
    "_attn_implementation_internal", "_experts_implementation_internal", "_heterogeneity_spec",
    "_experts_implementation", "number_of_conv_states",  # of layers without attention
}  # fmt: skip
MODEL = {
    **SIZES, "hidden_act": "silu", "rms_norm_eps": 1e-5, "head_dim": 8, "num_key_value_heads": 2,
    "sliding_window": None, "num_local_experts": 4, "num_experts_per_tok": 2, "rope_theta": 10000.0,
}  # fmt: skip


class Recorder(dict[str, Any]):
    """A config.json's object that notes which keys are asked for."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__(values)
        self.asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)


def values_of(architecture: str, **change: Any) -> dict[str, Any]:
    """A small config.json of an architecture, of keys that it knows."""
    config_class = getattr(transformers, architecture).config_class
    known = {field.name for field in dataclasses.fields(config_class)} | {"rope_theta"}
    values = {key: value for key, value in MODEL.items() if key in known}
    return {"architectures": [architecture], "model_type": config_class.model_type, **values, **change}


def attributes(source: str, name: str) -> Iterator[str]:
    """The keys that `name` (a variable or an attribute) is read by: name.key, name["key"], getattr, hasattr, get."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and called(node.value) == name:
            yield node.attr
        elif isinstance(node, ast.Subscript) and called(node.value) == name:
            yield from constants([node.slice])
        elif (
            isinstance(node, ast.Call) and called(node.func) in ("getattr", "hasattr") and called(node.args[0]) == name
        ):
            yield from constants(node.args[1:2])
        elif (
            isinstance(node, ast.Call)
            and called(node.func) == "get"
            and called(getattr(node.func, "value", None)) == name
        ):
            yield from constants(node.args[:1])


def called(node: ast.AST | None) -> str:
    return getattr(node, "id", None) or getattr(node, "attr", "")


def constants(nodes: list[Any]) -> Iterator[str]:
    yield from (node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))


@functools.cache
def keys_read(architecture: str) -> frozenset[str]:
    """What transformers reads of an architecture's config.json, in its class, its module and what modules share."""
    from transformers import cache_utils, masking_utils  # 3 s: not for every collection of tests

    model_class = getattr(transformers, architecture)
    config_class = model_class.config_class
    modules = (inspect.getmodule(model_class), masking_utils, cache_utils, modeling_rope_utils)
    names = set().union(*map(read_of_config, modules))
    names = {name for name in names if not callable(getattr(config_class, name, None))}
    names |= {field.name for field in dataclasses.fields(config_class)} | config_class.attribute_map.keys()
    popped = {"rope_theta", "rope_scaling", "partial_rotary_factor", "per_layer_config"}
    return frozenset(names | popped) - NOT_KEYS - properties(config_class)


@functools.cache
def read_of_config(module: Any) -> set[str]:
    source = inspect.getsource(module)
    return {*attributes(source, "config"), *attributes(source, "layer_config")}


def properties(config_class: type) -> set[str]:
    """Names that the class computes."""
    return {name for name in dir(config_class) if isinstance(inspect.getattr_static(config_class, name), property)} | {
        "default_theta", "base_model_tp_plan", "sub_configs"
    }  # fmt: skip


@pytest.mark.parametrize("architecture", FAMILIES)
@pytest.mark.slow
def test_every_key_that_transformers_reads_is_known(architecture: str) -> None:
    recorder = Recorder(values_of(architecture))
    model_config_from_hf(recorder)
    assert len(keys_read(architecture)) > 25
    assert keys_read(architecture) - recorder.asked - INERT == set()


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "longrope", "llama3"])
def test_every_key_of_a_rope_section_that_transformers_reads_is_read(kind: str) -> None:
    name = {"linear": "linear_scaling_rope", "dynamic": "dynamic_ntk", "llama3": "llama3"}.get(kind, kind)
    function = getattr(modeling_rope_utils, f"_compute_{name}_parameters")
    section = Recorder({
        "rope_type": kind, "factor": 4.0, "original_max_position_embeddings": 64, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
    })  # fmt: skip
    config = model_config_from_hf(values_of("LlamaForCausalLM", rope_scaling=section))
    wanted = set(attributes(inspect.getsource(function), "rope_parameters_dict")) - {"get"}
    assert len(wanted) > 1 and wanted - section.asked == set()
    assert (config.rope_scaling is None) == (kind == "dynamic")


def test_the_tables_hold_no_key_that_neither_transformers_nor_its_files_know() -> None:
    """INERT's other keys are those that transformers 4 wrote into every file (PretrainedConfig's own)."""
    old = {
        "_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_name_or_path", "add_cross_attention",
        "attn_implementation", "auto_map", "experts_implementation", "finetuning_task", "gradient_checkpointing",
        "is_decoder", "keys_to_ignore_at_inference", "name_or_path", "output_attentions", "prefix", "sep_token_id",
        "num_labels", "task_specific_params", "tie_last_hidden_states", "tokenizer_class", "torch_dtype", "torchscript",
        "unk_token_id", "use_bfloat16",
    }  # fmt: skip
    read = set().union(*(keys_read(architecture) for architecture in FAMILIES))
    assert INERT - read <= old


@pytest.mark.parametrize("architecture", FAMILIES)
def test_absent_keys_are_the_classs_own_or_required(architecture: str) -> None:
    values = values_of(architecture)
    config_class = getattr(transformers, architecture).config_class
    names = {"num_key_value_heads": "n_kv_head", "max_position_embeddings": "max_position", "head_dim": "head_dim",
             "rms_norm_eps": "norm_eps", "vocab_size": "vocab_size", "rope_theta": "rope_base"}  # fmt: skip
    for key, name in names.items():
        rest = {k: v for k, v in values.items() if k != key}
        theirs = config_class(**rest)
        try:
            ours = getattr(model_config_from_hf(rest), name)
        except ConfigError as error:
            assert error.key == key and "is required" in str(error)
            continue
        default = theirs.hidden_size // theirs.num_attention_heads if key == "head_dim" else None
        want = theirs.rope_parameters[key] if key == "rope_theta" else getattr(theirs, key, None)
        assert ours == (default if want is None else want), key


# Keys of published files that transformers ignores: Llama-1 ports, Yarn-Llama-2, generation's, training frameworks'.
IGNORED = {
    "max_sequence_length": 2048, "_flash_attn_2_enabled": True, "temperature": 0.6, "top_p": 0.9, "do_sample": True,
    "max_length": 4096, "min_length": 0, "length_penalty": 1.0, "repetition_penalty": 1.0, "rotary_type": "x",
    "unsloth_fixed": True, "is_llama_config": True, "transformers.js_config": {"dtype": "q4"}, "mlp_ratio": 3.5,
    "logits_scaling": 16.0, "use_mrope": False,
}  # fmt: skip


@pytest.mark.parametrize("architecture", FAMILIES)
def test_what_transformers_ignores_is_passed_over(architecture: str) -> None:
    plain = values_of(architecture)
    assert passed_over(plain) == []
    assert not IGNORED.keys() & keys_read(architecture)
    assert passed_over(plain | IGNORED) == sorted(IGNORED)
    assert model_config_from_hf(plain | IGNORED) == model_config_from_hf(plain)


@pytest.mark.parametrize("key", sorted(FIXED))
def test_keys_that_would_change_the_model_are_neutral_or_refused(key: str) -> None:
    plain = model_config_from_hf(values_of("LlamaForCausalLM"))
    assert model_config_from_hf(values_of("LlamaForCausalLM", **{key: FIXED[key]})) == plain
    with pytest.raises(ConfigError, match=f"^{key}: is not supported"):
        model_config_from_hf(values_of("LlamaForCausalLM", **{key: {"other": 1}}))


# --------------------------------------------------------------------- a model of such a file, beside transformers'

YARN_64K = {"factor": 16.0, "original_max_position_embeddings": 64, "type": "yarn", "finetuned": True, "attn_factor": 1}
FILES: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    # name -> (architecture, keys beside the sizes, those that must be passed over)
    "Llama-1 port": ("LlamaForCausalLM", {"architectures": ["LLaMAForCausalLM"], "max_sequence_length": 2048,
                     "pad_token_id": -1}, ["max_sequence_length"]),
    "no architectures": ("LlamaForCausalLM", {"architectures": None}, []),
    "Yarn-Llama-2": ("LlamaForCausalLM", {"rope_scaling": YARN_64K}, ["rope_scaling.finetuned"]),
    "swish": ("LlamaForCausalLM", {"hidden_act": "swish", "sliding_window": None, "temperature": 0.9}, ["temperature"]),
    "dynamic": ("LlamaForCausalLM", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, []),
    "dynamic, transformers 5": ("Qwen2ForCausalLM", {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0,
                                "rope_theta": 500000.0}}, []),
    "default with leftovers": ("MistralForCausalLM", {"rope_scaling": {"type": "default", "factor": 3.0}},
                               ["rope_scaling.factor"]),
    "original length beside the section": (
        "LlamaForCausalLM",
        {"original_max_position_embeddings": 32, "rope_scaling": {"type": "yarn", "factor": 8.0,
         "original_max_position_embeddings": 128}},
        [],
    ),
    "Phi-3's length inside only": (
        "Phi3ForCausalLM",
        {"rope_scaling": {"type": "su", "short_factor": [1.1] * 4, "long_factor": [3.0] * 4,
         "original_max_position_embeddings": 32}},
        [],
    ),
    "Phi-3's, saved again": (
        "Phi3ForCausalLM",
        {"rope_scaling": {"type": "su", "rope_type": "longrope", "short_factor": [1.1] * 4, "long_factor": [3.0] * 4},
         "original_max_position_embeddings": 64},
        [],
    ),
    "layer types": ("MistralForCausalLM", {"sliding_window": 9, "layer_types": ["sliding_attention"] * 3}, []),
    "Mixtral without rope_theta": ("MixtralForCausalLM", {"rope_theta": None}, []),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_logits_are_transformers(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    architecture, change, passed = FILES[name]
    change = copy.deepcopy(change)  # transformers writes into rope sections
    values = {key: value for key, value in values_of(architecture, **change).items() if key != "rope_theta" or value}
    model_class = getattr(transformers, architecture)
    theirs = {key: value for key, value in copy.deepcopy(values).items() if key not in ("architectures", "model_type")}
    reference = decided(model_class(model_class.config_class(**theirs, attn_implementation="eager")))
    reference.save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "config.json").write_text(json.dumps(values))
    with caplog.at_level(logging.WARNING):
        convert(open_job(tmp_path / "hf"), tmp_path / "out", progress=False)
    named = [record.args[1] for record in caplog.records if "passed over" in record.message]  # type: ignore[index]
    assert named == passed
    loaded = load_checkpoint(tmp_path / "out", device="cpu")
    tokens = torch.randint(0, 160, (1, 300), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = reference(tokens).logits
    assert (logits(loaded, tokens, steps=5) - want).abs().max() < 1e-4
