"""Small random models, and their quantized twins, for the quantization and evaluation tests."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from gpt_fast.checkpoint.directory import FORMAT
from gpt_fast.checkpoint.safetensors_file import TensorSpec, write_weights
from gpt_fast.config import ModelConfig
from gpt_fast.model.cache import KVCache
from gpt_fast.model.empty import empty_model
from gpt_fast.model.forward import Batch
from gpt_fast.model.transformer import Transformer
from gpt_fast.quantize.rtn import dequantize_weight, quantize_weight
from gpt_fast.quantize.scheme import Scheme
from gpt_fast.quantize.structure import apply_schemes, plan
from gpt_fast.text.token_bytes import byte_alphabet
from support.manifest import list_files

CPU = torch.device("cpu")

FAMILIES: dict[str, dict[str, object]] = {  # changes to small_config
    "tied": {},
    "untied": {"tie_embeddings": False},
    "biased": {"qkv_bias": True, "attention_out_bias": True, "mlp_bias": True},
    "experts": {"n_expert": 3, "n_expert_per_token": 2},
}


def small_config(**changes: object) -> ModelConfig:
    sizes: dict = {
        "vocab_size": 96,
        "n_layer": 2,
        "n_head": 4,
        "n_kv_head": 2,
        "dim": 96,
        "head_dim": 24,
        "intermediate_size": 160,
        "max_position": 64,
        "tie_embeddings": True,
    }
    return ModelConfig(**(sizes | changes))


def random_model(config: ModelConfig, *, seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    model = Transformer(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.05)
    return model.requires_grad_(False)


def quantized_state(model: Transformer, schemes: dict[str, Scheme]) -> dict[str, Tensor]:
    """The state dict of the model's quantized file, rounded to nearest."""
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        module, _, last = name.rpartition(".")
        if module in schemes and last == "weight":
            parts = quantize_weight(tensor, schemes[module], name=name)
            state |= {f"{module}.{part}": value for part, value in parts.items()}
        elif not (name == "output.weight" and model.config.tie_embeddings):
            state[name] = tensor
    return state


def quantized_model(model: Transformer, *, mode: str, groupsize: int, embedding: str = "auto") -> Transformer:
    schemes = plan(model, mode=mode, groupsize=groupsize, embedding=embedding)
    return model_of_state(model.config, schemes, quantized_state(model, schemes))


def model_of_state(config: ModelConfig, schemes: dict[str, Scheme], state: dict[str, Tensor]) -> Transformer:
    twin = empty_model(config)
    apply_schemes(twin, schemes)
    missing = twin.load_state_dict(state, strict=False, assign=True).missing_keys
    assert missing in ([], ["output.weight"])
    if config.tie_embeddings:
        twin.tie_output()
    return twin.requires_grad_(False)


def dequantized_model(model: Transformer, *, mode: str, groupsize: int, embedding: str = "auto") -> Transformer:
    """The same numbers as quantized_model in ordinary float32 layers."""
    schemes = plan(model, mode=mode, groupsize=groupsize, embedding=embedding)
    state = model.state_dict()
    for name, scheme in schemes.items():
        weight = f"{name}.weight"
        state[weight] = dequantize_weight(quantize_weight(state[weight], scheme, name=name), scheme)
    twin = Transformer(model.config)
    twin.load_state_dict(state)
    twin.requires_grad_(False)
    if model.config.tie_embeddings:
        with torch.no_grad():
            twin.tok_embeddings.weight.copy_(state["tok_embeddings.weight"])
    return twin


def logits_of(model: Transformer, tokens_BS: Tensor) -> Tensor:
    rows, length = tokens_BS.shape
    model.setup_rope(length, CPU)
    dtype = model.norm.weight.dtype
    cache = KVCache(model.config, slots=rows, max_seq_len=length, dtype=dtype, device=CPU)
    with torch.inference_mode():
        return model(Batch(tokens_BS, torch.arange(length).repeat(rows, 1), cache, length=length))


# ------------------------------------------------------------------------------- checkpoints on disk


def write_checkpoint(directory: Path, model: Transformer, *, tokenizer: bool = False) -> Path:
    """The model as a converted checkpoint, in its own dtype; if asked, with a tokenizer of bytes that 256 ends."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(hugging_face_config(model.config)))
    state = model.state_dict()
    if model.config.tie_embeddings:
        state.pop("output.weight")
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()]
    write_weights(directory, "model", specs, lambda spec: state[spec.name], metadata=FORMAT)
    if tokenizer:
        write_byte_tokenizer(directory)
    list_files(directory)
    return directory


def hugging_face_config(config: ModelConfig) -> dict:
    values = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_base,
        "tie_word_embeddings": config.tie_embeddings,
    }
    if config.attention_out_bias:
        values |= {"attention_bias": True, "mlp_bias": config.mlp_bias}
    if config.n_expert:
        experts = {"num_local_experts": config.n_expert, "num_experts_per_tok": config.n_expert_per_token}
        values |= {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "sliding_window": None} | experts
    return values


def write_byte_tokenizer(directory: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE(vocab=byte_alphabet(), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<end>", special=True)])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": 256}))
