"""Hugging Face's config.json -> ModelConfig, by schema.

A key that transformers reads for the architecture is read here, known to be inert, or refused by name where it is not
neutral; a key that transformers ignores is passed over (`passed_over` says which). tests/checkpoint/test_config_keys.py
holds the tables here to transformers' own classes. The form is the one transformers writes (4.x `rope_theta` /
`rope_scaling` and 5.x `rope_parameters`), and the rules for absent keys are the model classes' own
(github.com/huggingface/transformers, Apache-2.0). Nothing is taken from a directory's or a model's name.
"""

from __future__ import annotations

import json
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
    original_length: int | None = None  # of original_max_position_embeddings beside the rope section, where absent
    rope_base: float = 10000.0
    max_position: int | None = None  # where max_position_embeddings is absent; None: it must be there
    rope_kinds: tuple[str, ...] = ("linear", "dynamic", "llama3", "yarn", "longrope")
    partial_rotation: bool = False  # partial_rotary_factor is an option


LONGROPE = ("longrope", "su", "yarn")  # what Phi-3's files call it
FAMILIES = {
    "LlamaForCausalLM": Family("llama", bias_keys=True, mlp_bias_key=True, max_position=2048),
    "MistralForCausalLM": Family("mistral", window="all", states=("num_key_value_heads", "sliding_window")),
    "MixtralForCausalLM": Family(
        "mixtral", window="all", experts=True, states=("num_key_value_heads",), rope_base=1000000.0
    ),
    "Qwen2ForCausalLM": Family("qwen2", window="some", qkv_bias=True, states=("num_key_value_heads",)),
    "Qwen3ForCausalLM": Family(
        "qwen3", window="some", bias_keys=True, qk_norm=True, states=("num_key_value_heads", "head_dim")
    ),
    "Phi3ForCausalLM": Family("phi3", window="all", original_length=4096, rope_kinds=LONGROPE, partial_rotation=True),
}

# Keys that change nothing in a forward pass without training: bookkeeping, initialisation, dropout, output options.
# fmt: off
INERT = frozenset((
    "_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_name_or_path",
    "add_cross_attention", "attention_dropout", "attn_implementation", "auto_map", "bos_token_id",
    "chunk_size_feed_forward", "dtype", "embd_pdrop", "eos_token_id", "experts_implementation", "finetuning_task",
    "gradient_checkpointing", "id2label", "initializer_range", "is_decoder", "is_encoder_decoder",
    "keys_to_ignore_at_inference", "label2id", "max_window_layers", "name_or_path", "num_labels", "output_attentions",
    "output_hidden_states", "output_router_logits", "pad_token_id", "prefix", "pretraining_tp", "problem_type",
    "resid_pdrop", "return_dict", "router_aux_loss_coef", "router_jitter_noise", "sep_token_id",
    "task_specific_params", "tie_last_hidden_states", "tokenizer_class", "torch_dtype", "torchscript",
    "transformers_version", "unk_token_id", "use_bfloat16", "use_cache",
))
# fmt: on

# Keys that would change the model, accepted only with the value this engine computes. Those from `rope_interleaved` on
# transformers does not know, but other programs would.
FIXED: Mapping[str, object] = {
    "attention_chunk_size": None,
    "cross_attention_hidden_size": None,
    "fusion_config": None,
    "is_causal": True,
    "kv_sharing_modes": None,
    "per_layer_config": None,
    "quantization_config": None,
    "tie_encoder_decoder": False,
    "transformers_weights": None,
    "rope_interleaved": False,
    "lm_head_bias": False,
    "full_attn_mod": 1,
    "interpolate_factor": 1,
}
SILU = ("silu", "swish")

MISSING = object()
LIMIT = 1 << 24
QWEN_FULL_LAYERS = 28  # where max_window_layers is absent


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
        ConfigError: an unknown architecture, activation or rope type, a missing key, a wrong type, a key that would
            change the model.
    """
    return read_config(values, generation or {})[0]


def passed_over(values: Mapping[str, Any]) -> list[str]:
    """The keys of a config.json's object, and of its rope section, that change nothing since transformers ignores
    them."""
    return read_config(values, {})[1]


def read_config(values: Mapping[str, Any], generation: Mapping[str, Any]) -> tuple[ModelConfig, list[str]]:
    """The configuration, and the keys that were passed over."""
    fields = Fields(values)
    family = read_family(fields)
    for key, value in FIXED.items():
        fields.fixed(key, value)
    if family.experts:
        fields.fixed("num_experts", None)  # transformers takes it for num_local_experts
    fields.fixed("hidden_act", *SILU)
    sizes = read_sizes(fields, family)
    section = rope_section(fields)
    rope = read_rope(fields, section, family, max_position=sizes["max_position"], head_dim=sizes["head_dim"])
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
        eos_ids=read_eos(values, generation, sizes["vocab_size"]),
    )
    return config, [*fields.unread(INERT), *section.unread(frozenset())]


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
        "max_position": fields.integer("max_position_embeddings", family.max_position or MISSING, high=1 << 30),
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

    def fixed(self, key: str, *values: object) -> None:
        """A key that may only hold one of these values (or be absent)."""
        got = self.take(key, None)
        if got is not None and not any(got == value and isinstance(got, bool) == isinstance(value, bool)
                                       for value in values):  # fmt: skip
            allowed = ", ".join(map(json.dumps, values))
            raise ConfigError(self.prefix + key, "is not supported", got=got, allowed=allowed)

    def unread(self, inert: frozenset[str]) -> list[str]:
        """Keys that nobody read, by their full names."""
        return [self.prefix + key for key in sorted(self.values.keys() - self.read - inert)]

    def finish(self, *, where: str, inert: frozenset[str] = frozenset()) -> None:
        for key in self.unread(inert):
            raise ConfigError(key, f"unknown key in {where}", got=self.values[key.removeprefix(self.prefix)])


def read_family(fields: Fields) -> Family:
    """By `architectures`, whose capitals have changed over time, or else by model_type."""
    names, model_type = fields.take("architectures", None), fields.take("model_type", None)
    by_type = {family.model_type: name for name, family in FAMILIES.items()}
    if names is None and model_type in by_type:
        names = [by_type[model_type]]
    known = {name.casefold(): family for name, family in FAMILIES.items()}
    one = names[0] if isinstance(names, list) and len(names) == 1 else None
    family = known.get(one.casefold()) if isinstance(one, str) else None
    if family is None:
        raise ConfigError("architectures", "unknown architecture", got=names, allowed=", ".join(FAMILIES))
    if model_type != family.model_type:
        raise ConfigError("model_type", f"does not fit {one}", got=model_type, allowed=family.model_type)
    return family


def read_head_dim(fields: Fields, family: Family, dim: int, n_head: int) -> int:
    default: object = MISSING if "head_dim" in family.states else dim // n_head
    head_dim = fields.integer("head_dim", default)
    if fields.values.get("head_dim") is None and dim % n_head:
        raise ConfigError("hidden_size", f"must be a multiple of num_attention_heads={n_head}", got=dim)
    return head_dim


def read_window(fields: Fields, family: Family, n_layer: int) -> tuple[int | None, tuple[int, ...]]:
    """The attention window and the layers it applies to."""
    if "sliding_window" in family.states and "sliding_window" not in fields.values:
        raise ConfigError("sliding_window", "is required (null for none)")
    if family.window == "none":
        fields.fixed("sliding_window", None)
    window = fields.take("sliding_window", None)
    if family.window == "some":
        window = window if fields.boolean("use_sliding_window", False) else None
    types = read_layer_types(fields, n_layer)
    if family.window == "some":
        layers = sliding_layers(fields, types, window, n_layer)
    else:
        layers = tuple(range(n_layer)) if window is not None else ()
        if types is not None and types != layers:
            raise ConfigError("layer_types", "differs from sliding_window", got=fields.values["layer_types"])
    if window is not None:
        check_int("sliding_window", window, 1, 1 << 30)
    return (window, layers) if layers else (None, ())


def read_layer_types(fields: Fields, n_layer: int) -> tuple[int, ...] | None:
    """The layers that `layer_types` says slide; None where it is absent."""
    types = fields.take("layer_types", None)
    known = ("full_attention", "sliding_attention")
    if types is None:
        return None
    if not isinstance(types, list) or len(types) != n_layer or any(kind not in known for kind in types):
        raise ConfigError("layer_types", f"must name each of {n_layer} layers", got=types, allowed=", ".join(known))
    return tuple(index for index, kind in enumerate(types) if kind == "sliding_attention")


def sliding_layers(fields: Fields, types: tuple[int, ...] | None, window: object, n_layer: int) -> tuple[int, ...]:
    """Qwen's rule: `layer_types` where written, else every layer from `max_window_layers` on."""
    if types is None:
        first = fields.take("max_window_layers", QWEN_FULL_LAYERS)
        check_int("max_window_layers", first, 0, LIMIT)
        return tuple(range(first, n_layer)) if window is not None else ()
    if types and window is None:
        got = fields.values["layer_types"]
        raise ConfigError("layer_types", "has sliding layers, but no sliding_window is in use", got=got)
    return types


# --------------------------------------------------------------------------------------------- rope


class Rope(NamedTuple):
    base: float
    dim: int
    scaling: RopeScaling | None


def rope_section(fields: Fields) -> Fields:
    """`rope_scaling`, or transformers 5's `rope_parameters`."""
    section = fields.take("rope_parameters", None)
    scaling = fields.take("rope_scaling", None)
    if section is not None and scaling is not None and section != scaling:
        raise ConfigError("rope_scaling", "contradicts rope_parameters", got=scaling)
    name = "rope_parameters" if section is not None else "rope_scaling"
    section = section if section is not None else scaling if scaling is not None else {}
    if not isinstance(section, dict):
        raise ConfigError(name, "must be an object or null", got=section)
    return Fields(section, prefix=name + ".")


def read_rope(fields: Fields, section: Fields, family: Family, *, max_position: int, head_dim: int) -> Rope:
    """`rope_theta` and `partial_rotary_factor`, inside the section or beside it, and how frequencies are stretched."""
    base = section.number("rope_theta", fields.number("rope_theta", family.rope_base, low=1.0), low=1.0)
    outer = fields.number("partial_rotary_factor", 1.0, low=0.0, high=1.0)
    part = section.number("partial_rotary_factor", outer, low=0.0, high=1.0)
    if part != 1.0 and not family.partial_rotation:
        raise ConfigError("partial_rotary_factor", f"is not supported in a {family.model_type} model", got=part)
    rope_dim = int(head_dim * part)
    original = fields.take("original_max_position_embeddings", family.original_length)
    parsed = read_scaling(section, family, original=original, max_position=max_position, rope_dim=rope_dim)
    return Rope(base, 0 if rope_dim == head_dim else rope_dim, parsed)


def read_scaling(
    rope: Fields, family: Family, *, original: object, max_position: int, rope_dim: int
) -> RopeScaling | None:
    old = rope.take("type", "default")
    kind = rope.take("rope_type", old)
    same = LONGROPE if family.rope_kinds == LONGROPE and kind in LONGROPE else (kind,)
    if rope.values.get("type") not in (None, *same):
        raise ConfigError(rope.prefix + "type", f"contradicts rope_type {kind!r}", got=rope.values["type"])
    if kind == "default":
        return None
    if kind not in family.rope_kinds:
        allowed = ", ".join(("default", *family.rope_kinds))
        raise ConfigError(rope.prefix + "rope_type", "unknown rope type", got=kind, allowed=allowed)
    if kind == "longrope" or same == LONGROPE:
        return read_longrope(rope, original, max_position=max_position, rope_dim=rope_dim)
    if kind == "yarn":
        return read_yarn(rope, original, max_position=max_position)
    factor = rope.number("factor", low=0.0)
    if kind == "dynamic":  # it stretches texts past max_position_embeddings only, and no longer ones are served
        return None
    if kind == "linear":
        return RopeScaling(kind="linear", factor=factor)
    return RopeScaling(
        kind="llama3",
        factor=factor,
        low_freq_factor=rope.number("low_freq_factor", low=0.0),
        high_freq_factor=rope.number("high_freq_factor", low=0.0),
        original_max_position=read_original(rope, original, max_position),
    )


def read_original(rope: Fields, original: object, max_position: int) -> int:
    """The length before stretching; a value beside the rope section wins over one inside, as upstream."""
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
    for key in ("attn_factor", "extrapolation_factor"):  # transformers ignores them, the authors' own code does not
        rope.fixed(key, 1)
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
