"""Layouts of published checkpoints: config.json with the published keys and shrunk sizes, the tokenizer's files and
their quirks, how the weights are cut. Random weights are made by who writes one.

A token in a config is written by its spelling, and becomes its id; {} stands for what a class puts in of itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from support.tiny_tokenizers import Json, Special, bytes_json, special, spiece, spiece_json
from support.tokenizer_files import token

SMALL: Json = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 6}


@dataclass(frozen=True)
class Tokenizer:
    """files: name -> content, made when asked for. config: of tokenizer_config.json, without the chat template."""

    files: Callable[[], dict[str, bytes | Json]]
    config: Json = field(default_factory=dict)


@dataclass(frozen=True)
class Layout:
    """refused: what the refusal says; then there are no weights. weights: how they are cut. template: a file of TRL's,
    or the template itself. passed: keys that are passed over."""

    config: Json
    tokenizer: Tokenizer | None = None
    generation: Json = field(default_factory=dict)
    template: str | list[Json] | None = None
    weights: str = "safetensors"
    refused: str | None = None
    passed: Sequence[str] = ()
    extra: int = 0  # rows of the embedding past the last token
    reference: str = (
        "auto"  # whose ids are right: AutoTokenizer's, its class's ("class"), tokenizer.json's own ("file")
    )


# ------------------------------------------------------------------------------------------------ config.json


def config(architecture: str, model_type: str, **keys: Any) -> Json:
    return {"architectures": [architecture], "model_type": model_type, "hidden_act": "silu", "use_cache": True,
            "initializer_range": 0.02, "tie_word_embeddings": False, **SMALL, **keys}  # fmt: skip


def llama(version: str = "4.31.0", **keys: Any) -> Json:
    """As Llama 2's files say it; Llama 1's lack num_key_value_heads."""
    own = {
        "bos_token_id": "<s>",
        "eos_token_id": "</s>",
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "torch_dtype": "float16",
        "max_position_embeddings": 4096,
        "num_key_value_heads": 6,
    }
    return config("LlamaForCausalLM", "llama", **{**own, "transformers_version": version, **keys})


def llama1(**keys: Any) -> Json:
    own = {"rms_norm_eps": 1e-06, "max_position_embeddings": 2048, "pad_token_id": 0}
    values = llama("4.28.0.dev0", **{**own, **keys})
    return {
        key: value
        for key, value in values.items()
        if key not in ("num_key_value_heads", "rope_scaling", "pretraining_tp")
    }


LLAMA31_ROPE: Json = {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                      "original_max_position_embeddings": 8192, "rope_type": "llama3"}  # fmt: skip
BEGIN, END, EOT, EOM = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"


def llama3(**keys: Any) -> Json:
    own = {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": BEGIN,
        "eos_token_id": END,
        "max_position_embeddings": 8192,
        "num_key_value_heads": 2,
        "rope_theta": 500000.0,
        "torch_dtype": "bfloat16",
        "mlp_bias": False,
    }
    return llama("4.40.0.dev0", **{**own, **keys})


def llama31(**keys: Any) -> Json:
    own = {
        "eos_token_id": [END, EOM, EOT],
        "max_position_embeddings": 131072,
        "rope_scaling": LLAMA31_ROPE,
        "transformers_version": "4.42.3",
    }
    return llama3(**{**own, **keys})


def llama32(**keys: Any) -> Json:
    rope = {**LLAMA31_ROPE, "factor": 32.0}
    return llama31(**{"head_dim": 8, "rope_scaling": rope, "tie_word_embeddings": True, **keys})


def mistral(**keys: Any) -> Json:
    own = {
        "bos_token_id": "<s>",
        "eos_token_id": "</s>",
        "max_position_embeddings": 32768,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 12,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.34.0.dev0",
    }
    return config("MistralForCausalLM", "mistral", **{**own, **keys})


def mixtral(**keys: Any) -> Json:
    own = {
        "attention_dropout": 0.0,
        "bos_token_id": "<s>",
        "eos_token_id": "</s>",
        "max_position_embeddings": 32768,
        "num_experts_per_tok": 2,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "output_router_logits": False,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.02,
        "sliding_window": None,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.36.0.dev0",
    }
    return config("MixtralForCausalLM", "mixtral", **{**own, **keys})


def qwen2(**keys: Any) -> Json:
    own = {
        "attention_dropout": 0.0,
        "bos_token_id": "<|endoftext|>",
        "eos_token_id": "<|im_end|>",
        "max_position_embeddings": 32768,
        "max_window_layers": 28,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.43.1",
        "use_sliding_window": False,
    }
    return config("Qwen2ForCausalLM", "qwen2", **{**own, **keys})


def qwen3(**keys: Any) -> Json:
    own = {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": "<|endoftext|>",
        "eos_token_id": "<|im_end|>",
        "head_dim": 16,
        "max_position_embeddings": 40960,
        "max_window_layers": 28,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0",
        "use_sliding_window": False,
    }
    return config("Qwen3ForCausalLM", "qwen3", **{**own, **keys})


def phi3(**keys: Any) -> Json:
    own = {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": "<s>",
        "embd_pdrop": 0.0,
        "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
        "eos_token_id": "<|endoftext|>",
        "max_position_embeddings": 4096,
        "num_key_value_heads": 6,
        "original_max_position_embeddings": 4096,
        "pad_token_id": "<|endoftext|>",
        "resid_pdrop": 0.0,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "sliding_window": 13,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.40.2",
    }
    return config("Phi3ForCausalLM", "phi3", **{**own, **keys})


def long_factors(dims: int) -> Json:
    return {"long_factor": [1.0 + n for n in range(dims)], "short_factor": [1.0 + 0.05 * n for n in range(dims)]}


# ------------------------------------------------------------------------------------------------- tokenizers


def entry(content: str) -> Json:
    """A named token as transformers 4.2x wrote it."""
    return {"__type": "AddedToken", "content": content, "lstrip": False, "normalized": True, "rstrip": False,
            "single_word": False}  # fmt: skip


LLAMA_TOKENS: Json = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": None}
LLAMA_CONFIG: Json = {
    **LLAMA_TOKENS, "add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False,
    "model_max_length": 1000000000000000019884624838656, "sp_model_kwargs": {}, "tokenizer_class": "LlamaTokenizer",
}  # fmt: skip
OLD_LLAMA: Json = {**LLAMA_CONFIG, **{key: entry(text) for key, text in LLAMA_TOKENS.items() if text}}
BASE = {"0": token("<unk>", special=True), "1": token("<s>", special=True), "2": token("</s>", special=True)}


def decoder_of(added: Sequence[Special], first: int = 420) -> Json:
    more = {str(first + n): token(each.content, **each.flags) for n, each in enumerate(added)}
    return {"added_tokens_decoder": BASE | more}


def spm(
    *forms: str, added: Sequence[Special] = (), old: bool = False, bos: str | None = "<s>", **keys: Any
) -> Tokenizer:
    """forms: "model", and of tokenizer.json one of "prepend", "metaspace", "bare". old: tokens in added_tokens.json."""

    def files() -> dict[str, bytes | Json]:
        out: dict[str, bytes | Json] = {}
        for form in forms:
            if form == "model":
                out["tokenizer.model"] = spiece(add_dummy_prefix="bare" not in forms and not keys.get("no_prefix"))
            else:
                out["tokenizer.json"] = spiece_json(added, form=form, bos=bos)
        if old and added:
            out["added_tokens.json"] = {each.content: 420 + n for n, each in enumerate(added)}
        return out

    base = OLD_LLAMA if old else {**LLAMA_CONFIG, **decoder_of(added)}
    return Tokenizer(files, {**base, **{key: value for key, value in keys.items() if key != "no_prefix"}})


def bpe(cut: str, specials: Sequence[Special], *, files: str = "json", keys: Json, **options: Any) -> Tokenizer:
    """files: "json", "json+vocab", "vocab": tokenizer.json, vocab.json with merges.txt."""

    def make() -> dict[str, bytes | Json]:
        whole = bytes_json(cut, specials, **options)
        out: dict[str, bytes | Json] = {"tokenizer.json": whole} if "json" in files else {}
        if "vocab" in files:
            model = whole["model"]
            names = {each.content for each in specials}
            out["vocab.json"] = {name: n for name, n in model["vocab"].items() if name not in names}
            lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
            out["merges.txt"] = "\n".join(lines).encode() + b"\n"
        return out

    whole = bytes_json(cut, specials, **options)
    listed = {str(one["id"]): {k: v for k, v in one.items() if k != "id"} for one in whole["added_tokens"]}
    return Tokenizer(make, {"added_tokens_decoder": listed, "clean_up_tokenization_spaces": False, **keys})


CHATML = special("<|im_start|>", "<|im_end|>")
LLAMA3_SPECIALS = special(
    BEGIN, END, "<|reserved_special_token_0|>", "<|finetune_right_pad_id|>", "<|start_header_id|>",
    "<|end_header_id|>", EOM, EOT, "<|python_tag|>",
)  # fmt: skip
FAST: Json = {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "attention_mask"],
              "model_max_length": 131072}  # fmt: skip


def llama3_tokenizer(**keys: Any) -> Tokenizer:
    named = {"bos_token": BEGIN, "eos_token": END}
    return bpe("llama3", LLAMA3_SPECIALS, bos=BEGIN, ignore_merges=True, keys={**FAST, **named, **keys})


QWEN_SPECIALS = [
    *special("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *special("<|fim_prefix|>", "<tool_call>", "</tool_call>", special=False),
]
QWEN_CONFIG: Json = {
    "add_prefix_space": False, "additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "bos_token": None,
    "eos_token": "<|im_end|>", "errors": "replace", "model_max_length": 131072, "pad_token": "<|endoftext|>",
    "split_special_tokens": False, "tokenizer_class": "Qwen2Tokenizer", "unk_token": None,
}  # fmt: skip


def qwen_tokenizer(specials: Sequence[Special] = QWEN_SPECIALS, files: str = "json+vocab", **keys: Any) -> Tokenizer:
    return bpe("qwen2", specials, files=files, nfc=True, keys={**QWEN_CONFIG, **keys})


DS_BEGIN, DS_END = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
DEEPSEEK_SPECIALS = [*special(DS_BEGIN, DS_END), *special("<｜User｜>", "<｜Assistant｜>", "<think>", special=False)]
DEEPSEEK_CONFIG: Json = {
    "add_bos_token": True, "add_eos_token": False, "bos_token": entry(DS_BEGIN), "eos_token": entry(DS_END),
    "legacy": True, "model_max_length": 16384, "pad_token": entry(DS_END), "sp_model_kwargs": {}, "unk_token": None,
    "tokenizer_class": "LlamaTokenizerFast",
}  # fmt: skip
PHI_ADDED = [
    *special("<|endoftext|>", special=True), *special("<|assistant|>", special=True, rstrip=True),
    *special("<|system|>", special=True, rstrip=True), *special("<|end|>", special=True, rstrip=True),
    *special("<|user|>", special=True, rstrip=True),
]  # fmt: skip
MISTRAL_V3 = special("[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]")
TEKKEN = [*special("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[TOOL_CALLS]")]


def tekken(**keys: Any) -> Tokenizer:
    named = {
        "add_bos_token": True,
        "add_eos_token": False,
        "add_prefix_space": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "tokenizer_class": "GPT2Tokenizer",
    }
    return bpe("tekken", TEKKEN, first=True, bos="<s>", ignore_merges=True, keys={**named, **keys})


# ---------------------------------------------------------------------------------------------------- templates

CHATML_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'"
    "}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = "
    "messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>\\n' + system_message + "
    "'\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR_TEMPLATE = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + "
    "eos_token }}\n{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}"
    "\n{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + "
    "' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}{% endif %}{% endfor %}"
)
SOLAR_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{% if message['content']%}{{'### System:\n' + "
    "message['content']+'\n\n'}}{% endif %}{% elif message['role'] == 'user' %}{{'### User:\n' + message['content']+"
    "'\n\n'}}{% elif message['role'] == 'assistant' %}{{'### Assistant:\n'  + message['content']}}{% endif %}{% if "
    "loop.last and add_generation_prompt %}{{ '### Assistant:\n' }}{% endif %}{% endfor %}"
)
GUARD_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {% for part in message.content | "
    "selectattr('type', 'equalto', 'text') %}{{ part.text | trim }}{% endfor %}\n{% endfor %}{{ eos_token }}"
)
DEEPSEEK_LLM_TEMPLATE = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}{{ bos_token }}"
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + eos_token }}{% elif "
    "message['role'] == 'system' %}{{ message['content'] + '\n\n' }}{% endif %}{% endfor %}{% if add_generation_prompt "
    "%}{{ 'Assistant:' }}{% endif %}"
)

# --------------------------------------------------------------------------------------------------- the table

LLAMA2_TOKENIZER = spm("prepend", "model", legacy=False)
SLOW_LLAMA = spm("model", old=True)


def refused(architecture: str, model_type: str, **keys: Any) -> Layout:
    return Layout(config(architecture, model_type, **keys), refused=f"^architectures: .*{architecture}")


LAYOUTS: dict[str, Layout] = {
    # Llama 1 and what was made of it
    "huggyllama/llama-7b": Layout(
        llama1(max_sequence_length=2048), spm("prepend", "model", old=True), {"pad_token_id": 0}, weights="shards",
        passed=["max_sequence_length"]),
    "decapoda-research/llama-7b-hf": Layout(
        {**{k: v for k, v in llama1().items() if k != "max_position_embeddings"},
         "architectures": ["LLaMAForCausalLM"], "max_sequence_length": 2048, "pad_token_id": -1},
        SLOW_LLAMA, weights="bin without index", passed=["max_sequence_length"]),
    "openlm-research/open_llama_7b": Layout(llama1(), SLOW_LLAMA, weights="bin shards"),
    "lmsys/vicuna-7b-v1.5": Layout(
        llama(pad_token_id=0), spm("model", legacy=False), {"max_length": 4096, "temperature": 0.9, "top_p": 0.6},
        weights="bin"),
    "lmsys/vicuna-7b-v1.5-16k": Layout(
        llama(rope_scaling={"factor": 4.0, "type": "linear"}, max_sequence_length=16384), SLOW_LLAMA, weights="rotary",
        passed=["max_sequence_length"]),
    "lmsys/longchat-7b-16k": Layout(
        llama1(rope_condense_ratio=8, max_sequence_length=16384), SLOW_LLAMA, weights="bin shards",
        passed=["max_sequence_length", "rope_condense_ratio"]),
    "WizardLM/WizardLM-13B-V1.2": Layout(
        llama1(), spm("model", old=True, added=special("[PAD]"), pad_token="[PAD]"), weights="bin shards"),
    "NousResearch/Nous-Hermes-13b": Layout(
        llama1(), spm("prepend", "model", old=True, added=special("[PAD]")), {"pad_token_id": 0}, weights="bin shards"),
    "LLM360/Amber": Layout(llama1(rms_norm_eps=1e-06, temperature=0.8), SLOW_LLAMA, passed=["temperature"]),
    # Llama 2
    "meta-llama/Llama-2-7b-chat-hf": Layout(
        llama(), LLAMA2_TOKENIZER, {"temperature": 0.6, "max_length": 4096, "do_sample": True},
        template=LLAMA2_TEMPLATE, weights="shards"),
    "meta-llama/Llama-2-70b-hf": Layout(
        llama(num_key_value_heads=2), spm("prepend", legacy=False), weights="shards without index"),
    "meta-llama/LlamaGuard-7b": Layout(llama(rope_theta=10000.0, attention_bias=False), LLAMA2_TOKENIZER),
    "codellama/CodeLlama-7b-Python-hf": Layout(
        llama(max_position_embeddings=16384, rope_theta=1000000, torch_dtype="bfloat16"), LLAMA2_TOKENIZER),
    "codellama/CodeLlama-34b-Instruct-hf": Layout(
        llama(max_position_embeddings=16384, rope_theta=1000000, num_key_value_heads=2),
        spm("prepend", "model", use_default_system_prompt=True), template=LLAMA2_TEMPLATE),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": Layout(
        llama(attention_bias=False, max_position_embeddings=2048, num_key_value_heads=2, rope_theta=10000.0),
        spm("prepend", "model", legacy=False, pad_token="</s>", padding_side="right"), template=ZEPHYR_TEMPLATE),
    "NousResearch/Yarn-Llama-2-7b-64k": Layout(
        llama(auto_map={"AutoConfig": "configuration_llama.LlamaConfig"}, max_position_embeddings=65536,
              rope_scaling={"factor": 16.0, "original_max_position_embeddings": 4096, "type": "yarn",
                            "finetuned": True}),
        spm("prepend", "model", legacy=False), weights="bin shards", passed=["rope_scaling.finetuned"]),
    "togethercomputer/LLaMA-2-7B-32K": Layout(
        llama(max_position_embeddings=32768, rope_scaling={"factor": 8.0, "type": "linear"}), LLAMA2_TOKENIZER,
        weights="bin"),
    "OpenAssistant/llama2-13b-orca-8k-3319": Layout(
        llama(rope_scaling={"factor": 2.0, "type": "dynamic"}),
        spm("prepend", "model", added=special("<|system|>", "<|prompter|>", "<|assistant|>"), old=True), weights="bin"),
    "DAMO-NLP-SG/CLEX-7B-16K": Layout(
        llama(log_scale=False, use_flashattn=True, rope_scaling={"max_factor": 16, "param_factor": 1, "type": "clex"}),
        refused="rope_scaling.rope_type: unknown rope type .*clex"),
    "upstage/SOLAR-10.7B-Instruct-v1.0": Layout(
        llama(attention_bias=False, num_key_value_heads=2, rope_theta=10000.0, use_cache=False), LLAMA2_TOKENIZER,
        template=SOLAR_TEMPLATE),
    "princeton-nlp/Sheared-LLaMA-1.3B": Layout(llama(), SLOW_LLAMA, weights="bin"),
    "openbmb/MiniCPM-2B-sft-fp32-llama-format": Layout(
        llama(num_key_value_heads=6, rope_theta=10000.0), spm("model", "metaspace", legacy=False), weights="no model."),
    # Yi: no space before a text
    "01-ai/Yi-6B-Chat": Layout(
        llama(eos_token_id="<|im_end|>", bos_token_id="<|im_start|>", pad_token_id=0, rope_theta=5000000.0,
              num_key_value_heads=2),
        spm("bare", "model", added=CHATML, bos=None, add_bos_token=False, bos_token="<|im_start|>",
            eos_token="<|im_end|>", legacy=False),
        template=CHATML_TEMPLATE),
    "01-ai/Yi-1.5-9B-Chat-16K": Layout(
        llama(attention_bias=False, num_key_value_heads=2, rope_theta=5000000.0, max_position_embeddings=16384),
        spm("metaspace", "model", added=CHATML, bos=None, add_bos_token=False, legacy=True), template=CHATML_TEMPLATE),
    # Llama 3
    "meta-llama/Meta-Llama-3-8B-Instruct": Layout(
        llama3(eos_token_id=EOT), llama3_tokenizer(eos_token=EOT), {"eos_token_id": [END, EOT]},
        template="llama3.jinja", weights="shards"),
    "meta-llama/Llama-3.1-8B-Instruct": Layout(
        llama31(), llama3_tokenizer(eos_token=EOT), {"eos_token_id": [END, EOM, EOT], "temperature": 0.6},
        template="llama3_1.jinja"),
    "meta-llama/Llama-3.2-1B-Instruct": Layout(
        llama32(), llama3_tokenizer(eos_token=EOT), template="llama3_2.jinja"),
    "meta-llama/Llama-3.3-70B-Instruct": Layout(
        llama31(head_dim=8, num_key_value_heads=1), llama3_tokenizer(eos_token=EOT), template="llama3_1.jinja",
        weights="shards without index"),
    "meta-llama/Llama-Guard-3-1B": Layout(llama32(), llama3_tokenizer(eos_token=EOT), template=GUARD_TEMPLATE),
    "unsloth/Llama-3.2-1B-Instruct": Layout(
        llama32(pad_token_id="<|finetune_right_pad_id|>", unsloth_fixed=True, unsloth_version="2024.12.4"),
        llama3_tokenizer(eos_token=EOT, pad_token="<|finetune_right_pad_id|>", padding_side="left"),
        template="llama3_2.jinja", passed=["unsloth_fixed", "unsloth_version"]),
    "NousResearch/Hermes-3-Llama-3.1-8B": Layout(
        llama31(eos_token_id="<|im_end|>"),
        bpe("llama3", [*LLAMA3_SPECIALS, *CHATML, *special("<tool_call>", special=False)], bos=BEGIN,
            ignore_merges=True, keys={**FAST, "bos_token": BEGIN, "eos_token": "<|im_end|>", "pad_token": END}),
        template=[{"name": "default", "template": CHATML_TEMPLATE}, {"name": "tool_use", "template": CHATML_TEMPLATE}]),
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": Layout(
        llama31(bos_token_id=DS_BEGIN, eos_token_id=DS_END),
        bpe("llama3", DEEPSEEK_SPECIALS, bos=DS_BEGIN, ignore_merges=True, keys=DEEPSEEK_CONFIG),
        template="deepseek_r1_distill.jinja"),
    "nvidia/Llama-3.1-Minitron-4B-Width-Base": Layout(llama31(head_dim=16, eos_token_id=END), llama3_tokenizer()),
    "nvidia/Llama-3_1-Nemotron-51B-Instruct": refused("DeciLMForCausalLM", "nemotron-nas", block_configs=[]),
    # other makers' models of Llama's architecture
    "HuggingFaceTB/SmolLM-135M": Layout(
        llama(bos_token_id="<|endoftext|>", eos_token_id="<|endoftext|>", num_key_value_heads=2,
              tie_word_embeddings=True, rope_theta=10000.0, max_position_embeddings=2048),
        bpe("smollm", special("<|endoftext|>", "<repo_name>"), files="json+vocab",
            keys={"add_prefix_space": False, "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>",
                  "unk_token": "<|endoftext|>", "tokenizer_class": "GPT2Tokenizer", "vocab_size": 49152}),
        reference="file"),
    "HuggingFaceTB/SmolLM2-135M-Instruct": Layout(
        llama(bos_token_id="<|im_start|>", eos_token_id="<|im_end|>", pad_token_id="<|im_end|>", rope_theta=100000,
              is_llama_config=True, rope_interleaved=False, tie_word_embeddings=True, num_key_value_heads=2,
              **{"transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}}),
        bpe("smollm", special("<|endoftext|>", "<|im_start|>", "<|im_end|>"), first=True, files="json+vocab",
            keys={"add_prefix_space": False, "bos_token": "<|im_start|>", "eos_token": "<|im_end|>",
                  "unk_token": "<|endoftext|>", "pad_token": "<|im_end|>", "tokenizer_class": "GPT2Tokenizer"}),
        template=CHATML_TEMPLATE, passed=["is_llama_config", "transformers.js_config"], reference="file"),
    "HuggingFaceTB/SmolLM3-3B": refused("SmolLM3ForCausalLM", "smollm3", no_rope_layers=[1, 0]),
    "tiiuae/Falcon3-1B-Instruct": Layout(
        llama(attention_bias=False, head_dim=16, num_key_value_heads=2, rope_theta=1000042, bos_token_id=None,
              eos_token_id="<|endoftext|>", rms_norm_eps=1e-06),
        bpe("falcon", special("<|endoftext|>", "<|user|>", "<|assistant|>"),
            keys={**FAST, "eos_token": "<|endoftext|>"}),
        template="{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% if not loop.last %}{{ '\n' }}"
                 "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '\n<|assistant|>\n' }}{% endif %}"),
    "ibm-granite/granite-3b-code-instruct": Layout(
        llama(attention_bias=True, mlp_bias=True, bos_token_id="<|endoftext|>", eos_token_id="<|endoftext|>",
              tie_word_embeddings=True, attention_dropout=0.1),
        bpe("gpt2", special("<|endoftext|>", "<fim_prefix>"), files="vocab",
            keys={"add_prefix_space": False, "tokenizer_class": "GPT2Tokenizer", "unk_token": "<|endoftext|>",
                  "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"})),
    "deepseek-ai/deepseek-coder-6.7b-instruct": Layout(
        llama(bos_token_id=DS_BEGIN, eos_token_id=DS_END, rms_norm_eps=1e-06, rope_theta=100000,
              max_position_embeddings=16384, rope_scaling={"factor": 4.0, "type": "linear"}),
        bpe("deepseek", DEEPSEEK_SPECIALS, bos=DS_BEGIN, keys=DEEPSEEK_CONFIG), template=DEEPSEEK_LLM_TEMPLATE,
        extra=20),
    "deepseek-ai/deepseek-llm-7b-chat": Layout(
        llama(bos_token_id=DS_BEGIN, eos_token_id=DS_END, rms_norm_eps=1e-06),
        bpe("deepseek", DEEPSEEK_SPECIALS, bos=DS_BEGIN, keys={**DEEPSEEK_CONFIG, "tokenizer_class": "LlamaTokenizer"}),
        template=DEEPSEEK_LLM_TEMPLATE, weights="bin shards"),
    "ByteDance-Seed/Seed-Coder-8B-Instruct": Layout(
        llama(bos_token_id="<[begin▁of▁sentence]>", eos_token_id="<[end▁of▁sentence]>", head_dim=8, layer_types=None,
              rope_theta=500000.0, num_key_value_heads=2),
        bpe("llama3", special("<[begin▁of▁sentence]>", "<[end▁of▁sentence]>"), bos="<[begin▁of▁sentence]>", first=True,
            keys={**FAST, "bos_token": "<[begin▁of▁sentence]>", "eos_token": "<[end▁of▁sentence]>"})),
    "h2oai/h2o-danube3-500m-chat": Layout(
        llama(attention_bias=False, num_key_value_heads=2, rope_theta=100000, head_dim=8, sliding_window=None),
        spm("metaspace", added=special("<|prompt|>", "<|answer|>"), legacy=False), template=CHATML_TEMPLATE),
    "BSC-LT/salamandra-2b-instruct": Layout(
        llama(num_key_value_heads=2, eos_token_id="<|im_end|>", bos_token_id="<s>"),
        spm("model", "metaspace", added=CHATML, legacy=False), template=CHATML_TEMPLATE),
    # Mistral
    "mistralai/Mistral-7B-v0.1": Layout(mistral(), spm("prepend", "model", legacy=True), weights="shards"),
    "mistralai/Mistral-7B-Instruct-v0.2": Layout(
        mistral(rope_theta=1000000.0, sliding_window=None, attention_dropout=0.0), spm("prepend", "model", legacy=True),
        template=MISTRAL_TEMPLATE),
    "mistralai/Mistral-7B-Instruct-v0.3": Layout(
        mistral(rope_theta=1000000.0, sliding_window=None),
        spm("metaspace", "model", added=MISTRAL_V3, legacy=False), template=MISTRAL_TEMPLATE),
    "mistralai/Mistral-Nemo-Instruct-2407": Layout(
        mistral(head_dim=16, max_position_embeddings=1024000, rope_theta=1000000.0, sliding_window=None), tekken(),
        template=MISTRAL_TEMPLATE),
    "mistralai/Ministral-8B-Instruct-2410": Layout(
        mistral(head_dim=16, sliding_window=17, rope_theta=100000000.0), tekken(), template=MISTRAL_TEMPLATE),
    "mistralai/Mistral-Small-24B-Instruct-2501": Layout(
        mistral(head_dim=16, sliding_window=None, rope_theta=100000000.0),
        tekken(tokenizer_class="LlamaTokenizer", legacy=True), template=MISTRAL_TEMPLATE),
    "mistralai/Mistral-Small-3.2-24B (text)": Layout(
        mistral(head_dim=16, sliding_window=None), Tokenizer(lambda: {"tekken.json": {"config": {}, "vocab": []}}),
        refused=r"tekken\.json: is no tokenizer that is read here"),
    "HuggingFaceH4/zephyr-7b-beta": Layout(
        mistral(pad_token_id="</s>"),
        spm("prepend", "model", legacy=True, additional_special_tokens=["<unk>", "<s>", "</s>"], pad_token="</s>",
            truncation_side="left"),
        template=ZEPHYR_TEMPLATE),
    "teknium/OpenHermes-2.5-Mistral-7B": Layout(
        mistral(eos_token_id="<|im_end|>", use_cache=False),
        spm("model", added=[*special("<|im_end|>"), *special("<|im_start|>", special=False)], eos_token="<|im_end|>",
            legacy=True, additional_special_tokens=[], trust_remote_code=False),
        template=CHATML_TEMPLATE, weights="bin shards", reference="class"),
    "Open-Orca/Mistral-7B-OpenOrca": Layout(
        mistral(eos_token_id="<|im_end|>"),
        spm("model", added=CHATML, old=True, eos_token="<|im_end|>", legacy=True), template=CHATML_TEMPLATE,
        reference="class"),
    "openchat/openchat-3.5-0106": Layout(
        mistral(eos_token_id="<|end_of_turn|>", rope_theta=10000.0, bos_token_id="<s>"),
        spm("prepend", "model", added=[*special("<|end_of_turn|>"), *special("<|pad_0|>", special=False)],
            eos_token="<|end_of_turn|>", legacy=True)),
    "NousResearch/Yarn-Mistral-7b-128k": Layout(
        mistral(max_position_embeddings=32768, max_sequence_length=131072, sliding_window=131072,
                rope_scaling={"factor": 16.0, "finetuned": True, "original_max_position_embeddings": 8192,
                              "type": "yarn"}),
        spm("prepend", "model", legacy=True), weights="bin",
        passed=["max_sequence_length", "rope_scaling.finetuned"]),
    "h2oai/h2o-danube2-1.8b-chat": Layout(
        mistral(sliding_window=None, head_dim=8), spm("prepend", "model", legacy=False, pad_token="<unk>")),
    "mistralai/Ministral-3-3B-Instruct": refused("Mistral3ForConditionalGeneration", "mistral3"),
    # Mixtral
    "mistralai/Mixtral-8x7B-Instruct-v0.1": Layout(
        mixtral(), spm("prepend", "model", legacy=True), template=MISTRAL_TEMPLATE, weights="shards"),
    "mistralai/Mixtral-8x22B-Instruct-v0.1": Layout(
        mixtral(max_position_embeddings=65536, head_dim=8, router_jitter_noise=0.0),
        spm("metaspace", "model", added=MISTRAL_V3, legacy=True), template=MISTRAL_TEMPLATE),
    "NousResearch/Nous-Hermes-2-Mixtral-8x7B-DPO": Layout(
        mixtral(eos_token_id="<|im_end|>"),
        spm("prepend", "model", added=CHATML, legacy=True, eos_token="<|im_end|>", pad_token="</s>"),
        template=CHATML_TEMPLATE),
    # Qwen
    "Qwen/Qwen1.5-0.5B-Chat": Layout(
        qwen2(tie_word_embeddings=True, max_window_layers=21, num_key_value_heads=6, eos_token_id="<|im_end|>"),
        qwen_tokenizer(special("<|endoftext|>", "<|im_start|>", "<|im_end|>")), template=CHATML_TEMPLATE, extra=9),
    "Qwen/Qwen2-1.5B-Instruct": Layout(
        qwen2(tie_word_embeddings=True), qwen_tokenizer(files="vocab"), template=CHATML_TEMPLATE, extra=9),
    "Qwen/Qwen2.5-0.5B-Instruct": Layout(
        qwen2(tie_word_embeddings=True, max_window_layers=1), qwen_tokenizer(), {"eos_token_id": ["<|im_end|>"]},
        template="qwen2_5.jinja", extra=9),
    "Qwen/Qwen2.5-Coder-7B": Layout(qwen2(eos_token_id="<|endoftext|>"), qwen_tokenizer(eos_token="<|endoftext|>")),
    "Qwen/Qwen2.5-7B-Instruct-1M": Layout(
        qwen2(dual_chunk_attention_config={"chunk_size": 262144, "local_size": 8192}), qwen_tokenizer(),
        template="qwen2_5.jinja", passed=["dual_chunk_attention_config"]),
    "Qwen/Qwen2.5-7B-Instruct, as its page says for long texts": Layout(
        qwen2(rope_scaling={"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}),
        qwen_tokenizer(), template="qwen2_5.jinja"),
    "Qwen/QwQ-32B": Layout(
        qwen2(max_window_layers=64, rms_norm_eps=1e-05, eos_token_id="<|im_end|>"), qwen_tokenizer(),
        template="qwen3.jinja"),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": Layout(
        qwen2(bos_token_id=DS_BEGIN, eos_token_id=DS_END, sliding_window=4096, use_mrope=False),
        bpe("qwen2", DEEPSEEK_SPECIALS, nfc=True, keys=DEEPSEEK_CONFIG), template="deepseek_r1_distill.jinja",
        passed=["use_mrope"], reference="file"),
    "Qwen/Qwen3-0.6B": Layout(qwen3(tie_word_embeddings=True), qwen_tokenizer(), template="qwen3.jinja", extra=9),
    "Qwen/Qwen3-4B-Instruct-2507": Layout(
        qwen3(max_position_embeddings=262144, rope_theta=5000000, max_window_layers=36), qwen_tokenizer(),
        template="qwen3_instruct_2507.jinja", weights="shards"),
    "Qwen/Qwen3-4B, saved by transformers 5": Layout(
        {**{k: v for k, v in qwen3().items() if k not in ("rope_scaling", "rope_theta", "torch_dtype")},
         "dtype": "bfloat16", "layer_types": ["full_attention"] * 2,
         "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"}},
        qwen_tokenizer(), template="qwen3.jinja"),
    "Qwen/Qwen3-8B-AWQ": Layout(
        qwen3(quantization_config={"bits": 4, "quant_method": "awq", "version": "gemm"}), qwen_tokenizer(),
        refused="^quantization_config: is not supported"),
    "Qwen/Qwen3-30B-A3B": refused("Qwen3MoeForCausalLM", "qwen3_moe", num_experts=8),
    # Phi
    "microsoft/Phi-3-mini-4k-instruct": Layout(
        phi3(), spm("prepend", "model", added=PHI_ADDED, bos=None, add_bos_token=False, eos_token="<|endoftext|>",
                    legacy=False, tokenizer_class="LlamaTokenizer"),
        {"eos_token_id": ["<|endoftext|>", "<|end|>"]}, template="phi3.jinja"),
    "microsoft/Phi-3-mini-128k-instruct": Layout(
        phi3(max_position_embeddings=131072, rope_scaling={"type": "longrope", **long_factors(4)},
             sliding_window=262144),
        spm("prepend", added=PHI_ADDED, bos=None, add_bos_token=False, legacy=False, eos_token="<|endoftext|>"),
        template="phi3.jinja"),
    "microsoft/Phi-3.5-mini-instruct": Layout(
        phi3(max_position_embeddings=131072, rope_scaling={"type": "longrope", **long_factors(4)}, sliding_window=None),
        spm("prepend", "model", added=PHI_ADDED, bos=None, add_bos_token=False, legacy=False,
            eos_token="<|endoftext|>"),
        template="phi3_5.jinja"),
    "microsoft/phi-4": Layout(
        phi3(bos_token_id="<|endoftext|>", eos_token_id="<|im_end|>", pad_token_id="<|dummy_85|>", sliding_window=None,
             max_position_embeddings=16384, original_max_position_embeddings=16384, rope_theta=250000,
             num_key_value_heads=2),
        bpe("llama3", special("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|im_sep|>", "<|dummy_85|>"),
            files="json+vocab", keys={"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|endoftext|>",
                                      "eos_token": "<|im_end|>", "pad_token": "<|dummy_85|>",
                                      "unk_token": "<|endoftext|>", "add_prefix_space": False}),
        template=CHATML_TEMPLATE.replace("+ '\n' + m", "+ '<|im_sep|>' + m")),
    "microsoft/Phi-4-mini-instruct": Layout(
        phi3(partial_rotary_factor=0.75, max_position_embeddings=131072, num_key_value_heads=2, sliding_window=262144,
             tie_word_embeddings=True, bos_token_id="<|endoftext|>", full_attn_mod=1, interpolate_factor=1,
             lm_head_bias=False, mlp_bias=False, rope_scaling={"type": "longrope", **long_factors(3)}),
        bpe("llama3", special("<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"),
            keys={"tokenizer_class": "GPT2TokenizerFast", "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>",
                  "unk_token": "<|endoftext|>"}), template="phi3_5.jinja"),
    # architectures that are refused by name
    "google/gemma-2b-it": refused("GemmaForCausalLM", "gemma", head_dim=16),
    "google/gemma-2-2b-it": refused("Gemma2ForCausalLM", "gemma2", query_pre_attn_scalar=256),
    "google/gemma-3-1b-it": refused("Gemma3ForCausalLM", "gemma3_text", sliding_window_pattern=6),
    "internlm/internlm2-chat-7b": refused("InternLM2ForCausalLM", "internlm2", bias=False),
    "baichuan-inc/Baichuan2-7B-Chat": refused("BaichuanForCausalLM", "baichuan", z_loss_weight=0),
    "openbmb/MiniCPM-2B-sft-bf16": refused("MiniCPMForCausalLM", "minicpm", scale_emb=12),
    "ibm-granite/granite-3.1-2b-instruct": refused("GraniteForCausalLM", "granite", logits_scaling=8.0),
    "stabilityai/stablelm-2-1_6b": refused("StableLmForCausalLM", "stablelm", layer_norm_eps=1e-05),
    "allenai/OLMo-2-1124-7B": refused("Olmo2ForCausalLM", "olmo2"),
    "LGAI-EXAONE/EXAONE-3.5-2.4B-Instruct": refused("ExaoneForCausalLM", "exaone"),
    "microsoft/phi-2": refused("PhiForCausalLM", "phi", partial_rotary_factor=0.4),
    "openai/gpt-oss-20b": refused("GptOssForCausalLM", "gpt_oss", num_local_experts=4),
}  # fmt: skip
