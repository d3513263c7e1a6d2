"""Fields that clients of OpenAI, vLLM and llama-server send and that are not done here, but may ask for nothing.

A field that is in neither table nor known to the endpoint is refused by name; null passes for all of these. No torch.
"""

from __future__ import annotations

from typing import Any

from gpt_fast.serve.body import RequestError, expect, short

# What they mean leaves the answer as it is, whatever their value: (JSON type, its name). Where a request is kept, how
# soon it is served, for whom, what its text may be expected to be.
IGNORED: dict[str, tuple[type, str]] = {
    "store": (bool, "true or false"),
    "metadata": (dict, "an object"),
    "service_tier": (str, "a string"),
    "prompt_cache_key": (str, "a string"),
    "prompt_cache_retention": (str, "a string"),
    "safety_identifier": (str, "a string"),
    "prediction": (dict, "an object"),
    "session_id": (str, "a string"),
    "request_id": (str, "a string"),
    "guided_decoding_backend": (str, "a string"),
    "spaces_between_special_tokens": (bool, "true or false"),
    "return_token_offsets": (bool, "true or false"),
    "return_mm_kwargs": (bool, "true or false"),
    "stream_interval": (int, "a whole number"),
    "cache_prompt": (bool, "true or false"),
}

# Not offered: only these values, the others' defaults, which ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    # OpenAI
    "suffix": ("",),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "stream_options": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "moderation": (),
    # vLLM
    "add_generation_prompt": (True,),
    "add_special_tokens": (False,),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "detokenize": (True,),
    "documents": ([],),
    "early_stopping": (False,),
    "ec_transfer_params": (),
    "include_reasoning": (True,),
    "include_stop_str_in_output": (False,),
    "kv_transfer_params": (),
    "length_penalty": (1, 1.0),
    "logits_processors": ([],),
    "logprob_token_ids": (),
    "media_io_kwargs": ({},),
    "mm_processor_kwargs": ({},),
    "priority": (0,),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "repetition_detection": (),
    "return_prompt_text": (False,),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "routed_experts_prompt_start": (0,),
    "skip_special_tokens": (True,),
    "thinking_token_budget": (-1,),
    "truncate_prompt_tokens": (),
    "truncation_side": ("left", "right"),
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
    "watermarking": (False,),
    "enable_thinking": (),
    "thinking": (),
    "extra_body": ({},),
    # SGLang
    "lora_path": (),
    "no_stop_trim": (False,),
    "return_hidden_states": (False,),
    "separate_reasoning": (True,),
    "stream_reasoning": (True,),
    # llama-server
    "dry_multiplier": (0, 0.0),
    "dynatemp_range": (0, 0.0),
    "id_slot": (-1,),
    "lora": ([],),
    "mirostat": (0,),
    "n_discard": (0,),
    "n_indent": (0,),
    "n_keep": (0,),
    "n_predict": (-1,),
    "n_probs": (0,),
    "post_sampling_probs": (False,),
    "repeat_penalty": (1, 1.0),
    "response_fields": ([],),
    "return_progress": (False,),
    "return_tokens": (False,),
    "samplers": ([],),
    "t_max_predict_ms": (0,),
    "tfs_z": (1, 1.0),
    "timings_per_token": (False,),
    "top_n_sigma": (-1, -1.0),
    "typical_p": (1, 1.0),
    "xtc_probability": (0, 0.0),
}  # fmt: skip
# What to do instead, where something is.
INSTEAD = {
    "functions": "use tools",
    "function_call": "use tool_choice",
    "chat_template": "the model's own is used; chat_template_kwargs are its options",
    "truncate_prompt_tokens": "send a shorter prompt",
    "allowed_token_ids": "structured_outputs says which texts are allowed",
    "enable_thinking": 'chat_template_kwargs: {"enable_thinking": ...} asks the template for it',
    "thinking": 'chat_template_kwargs: {"enable_thinking": ...} asks the template for it',
    "n_predict": "use max_tokens",
    "repeat_penalty": "use repetition_penalty",
    "n_probs": "use logprobs",
    "suffix": "write the model's fill-in-the-middle marks into the prompt",
}


def is_neutral(name: str) -> bool:
    return name in NEUTRAL or name in IGNORED


def check_neutral(name: str, value: object) -> None:
    """Raise RequestError unless the value of this field, which the endpoint does not know, asks for nothing."""
    if value is None:
        return
    if name in IGNORED:
        kind, allowed = IGNORED[name]
        expect(value, name, kind, allowed)
        return
    if not any(type(value) is type(each) and value == each for each in NEUTRAL[name]):
        allowed = ", ".join(short(each) for each in (None, *NEUTRAL[name]))
        advice = f"; {INSTEAD[name]}" if name in INSTEAD else ""
        raise RequestError(f"{name}: not supported here (got {short(value)}, allowed {allowed}){advice}", param=name)
