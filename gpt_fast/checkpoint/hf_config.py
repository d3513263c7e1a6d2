"""Hugging Face's config.json -> ModelConfig, by schema: every key is read, known to be inert, or refused by name.

The form is the one transformers writes (4.x `rope_theta` / `rope_scaling` and 5.x `rope_parameters`), and the rules
for absent keys are the model classes' own (github.com/huggingface/transformers, Apache-2.0). Nothing is taken from a
directory's or a model's name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gpt_fast.config import ConfigError, ModelConfig, RopeScaling, check_int
from gpt_fast.files import read_json_object


class Family(NamedTuple):
    """What an architecture's class fixes that its config.json does not say."""

    model_type: str
    window: str = "none"  # "none", "all": every layer slides, "some": per layer, as Qwen says
    qkv_bias: bool = False
    bias_keys: bool = False  # attention_bias is an option
    mlp_bias_key: bool = False
    qk_norm: bool = False
    experts: bool = False
    states: tuple[str, ...] = ()  # keys whose default differs from Llama's, so they must be written
    original_length_key: bool = False  # original_max_position_embeddings stands outside the rope section
    longrope_names: tuple[str, ...] = ("longrope",)


FAMILIES = {
    "LlamaForCausalLM": Family("llama", bias_keys=True, mlp_bias_key=True),
    "MistralForCausalLM": Family("mistral", window="all", states=("num_key_value_heads", "sliding_window")),
    "MixtralForCausalLM": Family("mixtral", window="all", experts=True, states=("num_key_value_heads",)),
    "Qwen2ForCausalLM": Family("qwen2", window="some", qkv_bias=True),
    "Qwen3ForCausalLM": Family("qwen3", window="some", bias_keys=True, qk_norm=True, states=("head_dim",)),
    "Phi3ForCausalLM": Family(
        "phi3", window="all", original_length_key=True, longrope_names=("longrope", "su", "yarn")
    ),
}

# Keys that change nothing in a forward pass without training: bookkeeping, initialisation, dropout, output options.
# fmt: off
INERT = frozenset((
    "_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_name_or_path",
    "add_cross_attention", "attention_dropout", "attn_implementation", "auto_map", "bos_token_id",
    "chunk_size_feed_forward", "dtype", "embd_pdrop", "eos_token_id", "finetuning_task", "id2label",
    "initializer_range", "is_decoder", "is_encoder_decoder", "is_llama_config", "keys_to_ignore_at_inference",
    "label2id", "max_window_layers", "name_or_path", "output_attentions", "output_hidden_states",
    "output_router_logits", "pad_token_id", "prefix", "pretraining_tp", "problem_type", "resid_pdrop",
    "return_dict", "router_aux_loss_coef", "router_jitter_noise", "sep_token_id", "task_specific_params",
    "tokenizer_class", "torch_dtype", "torchscript", "transformers.js_config", "transformers_version",
    "unk_token_id", "unsloth_fixed", "unsloth_version", "use_bfloat16", "use_cache",
))
# fmt: on

# Keys that would change the model, accepted only with the value this engine computes.
FIXED: Mapping[str, object] = {
    "hidden_act": "silu",
    "rope_interleaved": False,
    "lm_head_bias": False,
    "full_attn_mod": 1,
    "interpolate_factor": 1,
    "cross_attention_hidden_size": None,
    "quantization_config": None,
    "tie_encoder_decoder": False,
}

MISSING = object()
LIMIT = 1 << 24


def load_model_config(checkpoint_dir: Path) -> ModelConfig:
    """Read config.json, and generation_config.json where there is one.

    Raises:
        ConfigError: naming the file, or the key, got and allowed.
    """
    generation = read_json_object(checkpoint_dir / "generation_config.json", optional=True)
    return model_config_from_hf(read_json_object(checkpoint_dir / "config.json"), generation=generation)


def model_config_from_hf(values: Mapping[str, Any], *, generation: Mapping[str, Any] | None = None) -> ModelConfig:
    """Translate a config.json's object; `generation` is generation_config.json's.

    Raises:
        ConfigError: an unknown architecture, activation, rope type or key, a missing key, a wrong type.
    """
    fields = Fields(values)
    family = read_family(fields)
    for key, value in FIXED.items():
        fields.fixed(key, value)
    sizes = read_sizes(fields, family)
    rope = read_rope(fields, family, max_position=sizes["max_position"], head_dim=sizes["head_dim"])
    window, sliding_layers = read_window(fields, family, sizes["n_layer"])
    config = ModelConfig(
        **sizes,
        **read_options(fields, family),
        norm_eps=fields.number("rms_norm_eps", low=0.0),
        rope_base=rope.base,
        rope_dim=rope.dim,
        rope_scaling=rope.scaling,
        sliding_window=window,
        sliding_layers=sliding_layers,
        bos_id=read_bos(values, sizes["vocab_size"]),
        eos_ids=read_eos(values, generation or {}, sizes["vocab_size"]),
    )
    fields.finish(where=f"config.json of a {family.model_type} model")
    return config


def read_sizes(fields: Fields, family: Family) -> dict[str, Any]:
    n_head, dim = fields.integer("num_attention_heads"), fields.integer("hidden_size")
    return {
        "vocab_size": fields.integer("vocab_size"),
        "n_layer": fields.integer("num_hidden_layers", high=1024),
        "n_head": n_head,
        "n_kv_head": fields.integer(
            "num_key_value_heads", MISSING if "num_key_value_heads" in family.states else n_head
        ),
        "dim": dim,
        "head_dim": read_head_dim(fields, family, dim, n_head),
        "intermediate_size": fields.integer("intermediate_size"),
        "max_position": fields.integer("max_position_embeddings", high=1 << 30),
        "n_expert": fields.integer("num_local_experts", high=1024) if family.experts else 0,
        "n_expert_per_token": fields.integer("num_experts_per_tok", high=1024) if family.experts else 0,
    }


def read_options(fields: Fields, family: Family) -> dict[str, Any]:
    """Biases, norms and ties. A bias that the family's class does not know may only be written as false."""
    biased = mlp_bias = False
    if family.bias_keys:
        biased = fields.boolean("attention_bias", False)
    else:
        fields.fixed("attention_bias", False)
    if family.mlp_bias_key:
        mlp_bias = fields.boolean("mlp_bias", False)
    else:
        fields.fixed("mlp_bias", False)
    return {
        "qkv_bias": family.qkv_bias or biased,
        "attention_out_bias": biased,
        "mlp_bias": mlp_bias,
        "qk_norm": family.qk_norm,
        "tie_embeddings": fields.boolean("tie_word_embeddings", False),
    }


class Fields:
    """A JSON object read key by key, with types; `finish` refuses what nobody read. null counts as absent."""

    def __init__(self, values: Mapping[str, Any], prefix: str = "") -> None:
        self.values = values
        self.prefix = prefix
        self.read: set[str] = set()

    def take(self, key: str, default: object = MISSING) -> Any:
        self.read.add(key)
        value = self.values.get(key)
        if value is not None:
            return value
        if default is MISSING:
            raise ConfigError(self.prefix + key, "is required")
        return default

    def integer(self, key: str, default: object = MISSING, *, high: int = LIMIT) -> int:
        value: int = self.take(key, default)
        check_int(self.prefix + key, value, 1, high)
        return value

    def number(self, key: str, default: object = MISSING, *, low: float, high: float = 1e12) -> float:
        """A finite number above `low`."""
        value = self.take(key, default)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not low < value <= high:
            raise ConfigError(
                self.prefix + key, "must be a number in range", got=value, allowed=f"above {low}, to {high:g}"
            )
        return float(value)

    def boolean(self, key: str, default: object = MISSING) -> bool:
        value = self.take(key, default)
        if not isinstance(value, bool):
            raise ConfigError(self.prefix + key, "must be true or false", got=value)
        return value

    def fixed(self, key: str, value: object) -> None:
        """A key that may only hold one value (or be absent)."""
        got = self.take(key, None)
        if got is not None and (got != value or isinstance(got, bool) != isinstance(value, bool)):
            raise ConfigError(self.prefix + key, "is not supported", got=got, allowed=str(value))

    def finish(self, *, where: str, inert: frozenset[str] = INERT) -> None:
        for key in sorted(self.values.keys() - self.read - inert):
            raise ConfigError(self.prefix + key, f"unknown key in {where}", got=self.values[key])


def read_family(fields: Fields) -> Family:
    names = fields.take("architectures")
    if not isinstance(names, list) or len(names) != 1 or names[0] not in FAMILIES:
        raise ConfigError("architectures", "unknown architecture", got=names, allowed=", ".join(FAMILIES))
    family = FAMILIES[names[0]]
    model_type = fields.take("model_type")
    if model_type != family.model_type:
        raise ConfigError("model_type", f"does not fit {names[0]}", got=model_type, allowed=family.model_type)
    return family


def read_head_dim(fields: Fields, family: Family, dim: int, n_head: int) -> int:
    default: object = MISSING if "head_dim" in family.states else dim // n_head
    head_dim = fields.integer("head_dim", default)
    if fields.values.get("head_dim") is None and dim % n_head:
        raise ConfigError("hidden_size", f"must be a multiple of num_attention_heads={n_head}", got=dim)
    return head_dim


def read_window(fields: Fields, family: Family, n_layer: int) -> tuple[int | None, tuple[int, ...]]:
    """The attention window and the layers it applies to."""
    if family.window == "none":
        return None, ()
    if family.window == "all":
        if "sliding_window" in family.states and "sliding_window" not in fields.values:
            raise ConfigError("sliding_window", "is required (null for none)")
        window = fields.take("sliding_window", None)
        layers = tuple(range(n_layer)) if window is not None else ()
    else:
        window = fields.take("sliding_window", None)
        window = window if fields.boolean("use_sliding_window", False) else None
        layers = sliding_layers(fields, window, n_layer)
    if window is not None:
        check_int("sliding_window", window, 1, 1 << 30)
    return (window, layers) if layers else (None, ())


def sliding_layers(fields: Fields, window: object, n_layer: int) -> tuple[int, ...]:
    """Qwen's rule: `layer_types` where written, else every layer from `max_window_layers` on."""
    types = fields.take("layer_types", None)
    if types is None:
        first = fields.take("max_window_layers", 0)
        check_int("max_window_layers", first, 0, LIMIT)
        return tuple(range(first, n_layer)) if window is not None else ()
    known = ("full_attention", "sliding_attention")
    if not isinstance(types, list) or len(types) != n_layer or any(kind not in known for kind in types):
        raise ConfigError("layer_types", f"must name each of {n_layer} layers", got=types, allowed=", ".join(known))
    layers = tuple(index for index, kind in enumerate(types) if kind == "sliding_attention")
    if layers and window is None:
        raise ConfigError("layer_types", "has sliding layers, but no sliding_window is in use", got=types)
    return layers


# --------------------------------------------------------------------------------------------- rope


class Rope(NamedTuple):
    base: float
    dim: int
    scaling: RopeScaling | None


def read_rope(fields: Fields, family: Family, *, max_position: int, head_dim: int) -> Rope:
    """`rope_theta`, `partial_rotary_factor` and `rope_scaling`, or transformers 5's `rope_parameters` of them all."""
    section = fields.take("rope_parameters", None)
    scaling = fields.take("rope_scaling", None)
    if section is not None and scaling is not None and section != scaling:
        raise ConfigError("rope_scaling", "contradicts rope_parameters", got=scaling)
    name = "rope_parameters" if section is not None else "rope_scaling"
    section = section if section is not None else scaling if scaling is not None else {}
    if not isinstance(section, dict):
        raise ConfigError(name, "must be an object or null", got=section)
    rope = Fields(section, prefix=name + ".")
    default_base = MISSING if family.experts else 10000.0
    outer_base = fields.number("rope_theta", default_base if "rope_theta" not in section else 10000.0, low=1.0)
    base = rope.number("rope_theta", outer_base, low=1.0)
    outer_factor = fields.number("partial_rotary_factor", 1.0, low=0.0, high=1.0)
    rope_dim = int(head_dim * rope.number("partial_rotary_factor", outer_factor, low=0.0, high=1.0))
    original = fields.take("original_max_position_embeddings", None) if family.original_length_key else None
    parsed = read_scaling(rope, family, original=original, max_position=max_position, rope_dim=rope_dim)
    rope.finish(where="the rope section", inert=frozenset())
    return Rope(base, 0 if rope_dim == head_dim else rope_dim, parsed)


def read_scaling(
    rope: Fields, family: Family, *, original: object, max_position: int, rope_dim: int
) -> RopeScaling | None:
    kind = rope.take("rope_type", rope.take("type", "default"))
    if rope.values.get("type") not in (None, kind):
        raise ConfigError(rope.prefix + "type", f"contradicts rope_type {kind!r}", got=rope.values["type"])
    if kind == "default":
        rope.take("original_max_position_embeddings", None)
        return None
    if kind in family.longrope_names:
        return read_longrope(rope, original, max_position=max_position, rope_dim=rope_dim)
    if kind == "linear":
        return RopeScaling(kind="linear", factor=rope.number("factor", low=0.0))
    if kind == "llama3":
        return RopeScaling(
            kind="llama3",
            factor=rope.number("factor", low=0.0),
            low_freq_factor=rope.number("low_freq_factor", low=0.0),
            high_freq_factor=rope.number("high_freq_factor", low=0.0),
            original_max_position=read_original(rope, original, max_position),
        )
    if kind == "yarn":
        return read_yarn(rope, original, max_position=max_position)
    allowed = "default, linear, llama3, yarn, longrope"
    raise ConfigError(rope.prefix + "rope_type", "unknown rope type", got=kind, allowed=allowed)


def read_original(rope: Fields, original: object, max_position: int) -> int:
    """The length before stretching; a value beside the rope section (Phi-3) wins over one inside, as upstream."""
    inside = rope.take("original_max_position_embeddings", max_position)
    value = original if original is not None else inside
    check_int("original_max_position_embeddings", value, 2, 1 << 30)
    return value  # type: ignore[return-value]


def read_yarn(rope: Fields, original: object, *, max_position: int) -> RopeScaling:
    """YaRN (arXiv:2309.00071); cos and sin are scaled by 0.1 ln(factor) + 1 unless the checkpoint says otherwise."""
    length = read_original(rope, original, max_position)
    factor = rope.number("factor", max_position / length, low=0.0)
    mscale = rope.number("mscale", 0.0, low=-1e-9)
    mscale_all_dim = rope.number("mscale_all_dim", 0.0, low=-1e-9)
    attention = yarn_mscale(factor, 1.0)
    if mscale and mscale_all_dim:
        attention = yarn_mscale(factor, mscale) / yarn_mscale(factor, mscale_all_dim)
    rope.fixed("truncate", True)
    return RopeScaling(
        kind="yarn",
        factor=factor,
        original_max_position=length,
        beta_fast=rope.number("beta_fast", 32.0, low=0.0),
        beta_slow=rope.number("beta_slow", 1.0, low=0.0),
        attention_factor=rope.number("attention_factor", attention, low=0.0),
    )


def yarn_mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def read_longrope(rope: Fields, original: object, *, max_position: int, rope_dim: int) -> RopeScaling:
    """LongRoPE (arXiv:2402.13753): a divisor a frequency, and cos and sin scaled by sqrt(1 + ln s / ln original)."""
    length = read_original(rope, original, max_position)
    factor = rope.number("factor", max_position / length, low=0.0)
    attention = math.sqrt(1 + math.log(factor) / math.log(length)) if factor > 1 else 1.0
    return RopeScaling(
        kind="longrope",
        factor=factor,
        original_max_position=length,
        short_factor=read_factors(rope, "short_factor", rope_dim // 2),
        long_factor=read_factors(rope, "long_factor", rope_dim // 2),
        attention_factor=rope.number("attention_factor", attention, low=0.0),
    )


def read_factors(rope: Fields, key: str, count: int) -> tuple[float, ...]:
    values = rope.take(key)
    if not isinstance(values, list) or len(values) != count:
        raise ConfigError(rope.prefix + key, f"must be a list of {count} numbers", got=values)
    return tuple(Fields({key: value}, rope.prefix).number(key, low=0.0) for value in values)


# ------------------------------------------------------------------------------------ special tokens


def read_bos(values: Mapping[str, Any], vocab_size: int) -> int | None:
    bos_id = values.get("bos_token_id")
    if bos_id is not None:
        check_int("bos_token_id", bos_id, 0, vocab_size - 1)
    return bos_id


def read_eos(values: Mapping[str, Any], generation: Mapping[str, Any], vocab_size: int) -> tuple[int, ...]:
    """Every id that ends a generation, from both files, in the order met."""
    ids: list[int] = []
    for where in (values, generation):
        listed = where.get("eos_token_id")
        for value in listed if isinstance(listed, list) else [] if listed is None else [listed]:
            check_int("eos_token_id", value, 0, vocab_size - 1)
            ids.append(value)
    return tuple(dict.fromkeys(ids))
