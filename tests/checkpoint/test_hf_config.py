"""config.json by schema: published files read, every mutation of one key accepted or named."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt_fast.checkpoint.hf_config import INERT, load_model_config, model_config_from_hf
from gpt_fast.config import ConfigError, ModelConfig

LLAMA2_7B = {
    "_name_or_path": "meta-llama/Llama-2-7b-chat-hf", "architectures": ["LlamaForCausalLM"], "bos_token_id": 1,
    "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 11008, "max_position_embeddings": 4096, "model_type": "llama", "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 32, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "float16", "transformers_version": "4.32.0",
    "use_cache": True, "vocab_size": 32000,
}  # fmt: skip
LLAMA31_SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # name -> (the published file, what must come out)
    "openlm-research/open_llama_7b": (
        {"architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
         "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 11008, "max_position_embeddings": 2048,
         "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32, "pad_token_id": 0,
         "rms_norm_eps": 1e-06, "tie_word_embeddings": False, "torch_dtype": "float16",
         "transformers_version": "4.28.0.dev0", "use_cache": True, "vocab_size": 32000},
        {"n_kv_head": 32, "max_position": 2048, "norm_eps": 1e-6, "rope_base": 10000.0},
    ),
    "meta-llama/Llama-2-7b-chat-hf": (LLAMA2_7B, {"n_kv_head": 32, "max_position": 4096, "eos_ids": (2,)}),
    "meta-llama/Llama-2-13b-chat-hf": (
        {**LLAMA2_7B, "hidden_size": 5120, "intermediate_size": 13824, "num_attention_heads": 40,
         "num_hidden_layers": 40, "num_key_value_heads": 40},
        {"dim": 5120, "head_dim": 128},
    ),
    "meta-llama/Llama-2-70b-chat-hf": (
        {**LLAMA2_7B, "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64,
         "num_hidden_layers": 80, "num_key_value_heads": 8},
        {"n_kv_head": 8, "head_dim": 128},
    ),
    "codellama/CodeLlama-7b-Python-hf": (
        {**LLAMA2_7B, "max_position_embeddings": 16384, "rope_theta": 1000000, "torch_dtype": "bfloat16"},
        {"rope_base": 1e6, "vocab_size": 32000},
    ),
    "codellama/CodeLlama-34b-Python-hf": (
        {**LLAMA2_7B, "hidden_size": 8192, "intermediate_size": 22016, "num_attention_heads": 64,
         "num_hidden_layers": 48, "num_key_value_heads": 8, "max_position_embeddings": 16384, "rope_theta": 1000000},
        {"n_layer": 48, "n_kv_head": 8},
    ),
    "meta-llama/Llama-3.1-8B-Instruct": (
        {**LLAMA2_7B, "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
         "eos_token_id": [128001, 128008, 128009], "intermediate_size": 14336, "max_position_embeddings": 131072,
         "mlp_bias": False, "num_key_value_heads": 8, "rope_scaling": LLAMA31_SCALING, "rope_theta": 500000.0,
         "vocab_size": 128256},
        {"eos_ids": (128001, 128008, 128009), "max_position": 131072, "rope_base": 500000.0},
    ),
    "meta-llama/Llama-3.2-1B": (
        {**LLAMA2_7B, "attention_bias": False, "head_dim": 64, "hidden_size": 2048, "intermediate_size": 8192,
         "max_position_embeddings": 131072, "mlp_bias": False, "num_hidden_layers": 16, "num_key_value_heads": 8,
         "bos_token_id": 128000, "eos_token_id": 128001, "rope_scaling": {**LLAMA31_SCALING, "factor": 32.0},
         "rope_theta": 500000.0, "tie_word_embeddings": True, "vocab_size": 128256},
        {"tie_embeddings": True, "head_dim": 64},
    ),
    "mistralai/Mistral-7B-v0.1": (
        {"architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
         "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
         "max_position_embeddings": 32768, "model_type": "mistral", "num_attention_heads": 32,
         "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
         "sliding_window": 4096, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
         "transformers_version": "4.34.0.dev0", "use_cache": True, "vocab_size": 32000},
        {"sliding_window": 4096, "sliding_layers": tuple(range(32))},
    ),
    "mistralai/Mixtral-8x7B-Instruct-v0.1": (
        {"architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
         "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
         "max_position_embeddings": 32768, "model_type": "mixtral", "num_attention_heads": 32,
         "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8,
         "output_router_logits": False, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
         "router_aux_loss_coef": 0.02, "sliding_window": None, "tie_word_embeddings": False,
         "torch_dtype": "bfloat16", "transformers_version": "4.36.0.dev0", "use_cache": True, "vocab_size": 32000},
        {"n_expert": 8, "n_expert_per_token": 2, "sliding_window": None, "rope_base": 1e6},
    ),
    "Qwen/Qwen2.5-7B-Instruct": (
        {"architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
         "eos_token_id": 151645, "hidden_act": "silu", "hidden_size": 3584, "initializer_range": 0.02,
         "intermediate_size": 18944, "max_position_embeddings": 32768, "max_window_layers": 28,
         "model_type": "qwen2", "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4,
         "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 131072, "tie_word_embeddings": False,
         "torch_dtype": "bfloat16", "transformers_version": "4.43.1", "use_cache": True,
         "use_sliding_window": False, "vocab_size": 152064},
        {"qkv_bias": True, "attention_out_bias": False, "sliding_window": None, "sliding_layers": ()},
    ),
    "Qwen/Qwen3-0.6B": (
        {"architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
         "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024,
         "initializer_range": 0.02, "intermediate_size": 3072, "max_position_embeddings": 40960,
         "max_window_layers": 28, "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28,
         "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000,
         "sliding_window": None, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
         "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False, "vocab_size": 151936},
        {"qk_norm": True, "head_dim": 128, "tie_embeddings": True},
    ),
    "HuggingFaceTB/SmolLM2-135M-Instruct": (
        {"architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1,
         "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 576, "initializer_range": 0.041666666666666664,
         "intermediate_size": 1536, "is_llama_config": True, "max_position_embeddings": 8192, "mlp_bias": False,
         "model_type": "llama", "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3,
         "pad_token_id": 2, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_interleaved": False,
         "rope_scaling": None, "rope_theta": 100000, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
         "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}, "transformers_version": "4.42.3",
         "use_cache": True, "vocab_size": 49152},
        {"dim": 576, "n_head": 9, "n_kv_head": 3, "rope_base": 100000.0, "tie_embeddings": True},
    ),
    "microsoft/Phi-3-mini-128k-instruct": (
        {"architectures": ["Phi3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
         "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}, "bos_token_id": 1, "embd_pdrop": 0.0,
         "eos_token_id": 32000, "hidden_act": "silu", "hidden_size": 3072, "initializer_range": 0.02,
         "intermediate_size": 8192, "max_position_embeddings": 131072, "model_type": "phi3",
         "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
         "original_max_position_embeddings": 4096, "pad_token_id": 32000, "resid_pdrop": 0.0, "rms_norm_eps": 1e-05,
         "rope_scaling": {"long_factor": [2.0] * 48, "short_factor": [1.05] * 48, "type": "longrope"},
         "rope_theta": 10000.0, "sliding_window": 262144, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
         "transformers_version": "4.40.2", "use_cache": True, "vocab_size": 32064},
        {"sliding_window": 262144, "head_dim": 96},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files(name: str) -> None:
    values, want = PUBLISHED[name]
    config = model_config_from_hf(values)
    assert {key: getattr(config, key) for key in want} == want


def test_rope_of_published_files() -> None:
    llama = model_config_from_hf(PUBLISHED["meta-llama/Llama-3.1-8B-Instruct"][0]).rope_scaling
    assert llama is not None
    assert (llama.kind, llama.factor, llama.original_max_position) == ("llama3", 8.0, 8192)
    phi = model_config_from_hf(PUBLISHED["microsoft/Phi-3-mini-128k-instruct"][0]).rope_scaling
    assert phi is not None and phi.attention_factor is not None
    assert (phi.kind, phi.original_max_position, len(phi.long_factor)) == ("longrope", 4096, 48)
    assert math.isclose(phi.attention_factor, math.sqrt(1 + math.log(32) / math.log(4096)))


def test_qwen_windows_begin_at_max_window_layers() -> None:
    values = {**PUBLISHED["Qwen/Qwen2.5-7B-Instruct"][0], "use_sliding_window": True, "max_window_layers": 20}
    config = model_config_from_hf(values)
    assert (config.sliding_window, config.sliding_layers) == (131072, tuple(range(20, 28)))
    listed = ["sliding_attention", *["full_attention"] * 27]
    assert model_config_from_hf({**values, "layer_types": listed}).sliding_layers == (0,)


def changed(**change: Any) -> dict[str, Any]:
    return {**LLAMA2_7B, **change}


def without(key: str, values: dict[str, Any] = LLAMA2_7B) -> dict[str, Any]:
    return {k: v for k, v in values.items() if k != key}


MISTRAL = PUBLISHED["mistralai/Mistral-7B-v0.1"][0]
QWEN3 = PUBLISHED["Qwen/Qwen3-0.6B"][0]
PHI3 = PUBLISHED["microsoft/Phi-3-mini-128k-instruct"][0]


@pytest.mark.parametrize(
    ("values", "names"),
    [
        (changed(architectures=["MambaForCausalLM"]), "architectures: .*MambaForCausalLM"),
        (changed(architectures=["LlamaForCausalLM", "x"]), "architectures"),
        (changed(architectures=[3]), "architectures"),
        (without("architectures", changed(model_type="gpt2")), "architectures"),
        (changed(model_type="mistral"), "model_type"),
        (changed(hidden_act="gelu"), "hidden_act: .*gelu"),
        (changed(sliding_window=5), "sliding_window: is not supported .*allowed null"),
        (changed(layer_types=["sliding_attention"] * 32), "layer_types: differs from sliding_window"),
        ({**MISTRAL, "layer_types": ["full_attention"] * 32}, "layer_types: differs from sliding_window"),
        (changed(per_layer_config={"1": {"head_dim": 3}}), "per_layer_config"),
        (changed(is_causal=False), "is_causal"),
        (changed(partial_rotary_factor=0.5), "partial_rotary_factor: is not supported in a llama model"),
        ({**PUBLISHED["mistralai/Mixtral-8x7B-Instruct-v0.1"][0], "num_experts": 4}, "num_experts"),
        (changed(quantization_config={"quant_method": "awq"}), "quantization_config"),
        (changed(rope_interleaved=True), "rope_interleaved"),
        (changed(hidden_size="4096"), "hidden_size"),
        (changed(hidden_size=4096.0), "hidden_size"),
        (changed(num_hidden_layers=True), "num_hidden_layers"),
        (changed(num_hidden_layers=10**9), "num_hidden_layers"),
        (changed(vocab_size=0), "vocab_size"),
        (changed(rms_norm_eps=float("nan")), "rms_norm_eps"),
        (changed(rms_norm_eps=-1.0), "rms_norm_eps"),
        (changed(tie_word_embeddings=1), "tie_word_embeddings"),
        (changed(num_key_value_heads=5), "n_kv_head"),
        (changed(num_attention_heads=30, num_key_value_heads=30), "hidden_size"),
        (changed(eos_token_id=32000), "eos_token_id"),
        (changed(eos_token_id=[1, "2"]), "eos_token_id"),
        (changed(bos_token_id=-1), "bos_token_id"),
        (changed(rope_scaling={"type": "dynamic"}), "rope_scaling.factor: is required"),
        ({**PHI3, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type: unknown rope type .*linear"),
        (changed(rope_scaling={"type": "yarn", "factor": 2.0, "attn_factor": 1.5}), "rope_scaling.attn_factor"),
        (changed(rope_scaling={"rope_type": "mrope"}), "rope_type"),
        (changed(rope_scaling={"type": "linear"}), "rope_scaling.factor"),
        (changed(rope_scaling={"type": "linear", "rope_type": "yarn", "factor": 2.0}), "rope_scaling.type"),
        (changed(rope_scaling={"rope_type": "yarn", "factor": 4.0, "truncate": False}), "truncate"),
        (
            changed(rope_scaling={"type": "linear", "factor": 2.0}, rope_parameters={"rope_type": "default"}),
            "contradicts rope_parameters",
        ),
        (changed(rope_scaling="linear"), "rope_scaling"),
        (changed(rope_theta=0), "rope_theta"),
        (without("hidden_size"), "hidden_size: is required"),
        (without("rms_norm_eps"), "rms_norm_eps: is required"),
        (without("sliding_window", MISTRAL), "sliding_window: is required"),
        (without("num_key_value_heads", MISTRAL), "num_key_value_heads: is required"),
        (without("head_dim", QWEN3), "head_dim: is required"),
        ({**MISTRAL, "attention_bias": True}, "attention_bias"),
        ({**QWEN3, "layer_types": ["full_attention"]}, "layer_types"),
        ({**QWEN3, "layer_types": ["sliding_attention"] * 28}, "layer_types"),
        ({**QWEN3, "layer_types": ["chunked_attention"] * 28}, "layer_types"),
        ({**PHI3, "rope_scaling": {**PHI3["rope_scaling"], "long_factor": [1.0] * 47}}, "long_factor"),
        ({**PHI3, "rope_scaling": {**PHI3["rope_scaling"], "short_factor": ["1"] * 48}}, "short_factor"),
        ({**PHI3, "partial_rotary_factor": 1.5}, "partial_rotary_factor"),
    ],
)
def test_refusals_name_the_key(values: dict[str, Any], names: str) -> None:
    with pytest.raises(ConfigError, match=names):
        model_config_from_hf(values)


def test_transformers_4_and_5_spellings_agree() -> None:
    four = changed(rope_scaling=LLAMA31_SCALING, rope_theta=500000.0)
    five = without("rope_scaling", changed(rope_parameters={**LLAMA31_SCALING, "rope_theta": 500000.0}))
    assert model_config_from_hf(four) == model_config_from_hf(five)


def test_eos_is_the_union_of_both_files() -> None:
    config = model_config_from_hf(changed(eos_token_id=2), generation={"eos_token_id": [5, 2, 9], "temperature": 1.0})
    assert config.eos_ids == (2, 5, 9)
    assert model_config_from_hf(changed(eos_token_id=None)).eos_ids == ()


@pytest.mark.parametrize(
    ("text", "names"),
    [("{", "is not readable JSON"), ("[]", "one JSON object"), ('{"rms_norm_eps": NaN}', "NaN"), ("\xff", "readable")],
)
def test_unreadable_files_are_named(text: str, names: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=names) as caught:
        load_model_config(tmp_path)
    assert "config.json" in str(caught.value)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json: no such file"):
        load_model_config(tmp_path)


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**20), 10**20),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


@pytest.mark.slow
@given(st.sampled_from(sorted(PUBLISHED)), st.data())
def test_any_change_of_one_key_is_read_or_named(name: str, data: st.DataObject) -> None:
    values = copy.deepcopy(PUBLISHED[name][0])
    key = data.draw(st.sampled_from([*sorted(values), "rope_parameters", "layer_types"]))
    values[key] = data.draw(JUNK)
    try:
        assert isinstance(model_config_from_hf(values), ModelConfig)
    except ConfigError as error:
        assert "\n" not in str(error) and error.key
        assert key not in INERT or key.endswith("token_id") or key == "max_window_layers"


def test_every_inert_key_changes_nothing() -> None:
    plain = model_config_from_hf(LLAMA2_7B)
    for key in sorted(INERT - {"bos_token_id", "eos_token_id"}):
        assert model_config_from_hf(changed(**{key: 0.5})) == plain
