"""What a model is, how it is served, what a request may ask: three frozen dataclasses, checked on the way in.

No torch here: the scheduler, the HTTP layer and the handler's start-up check import this file.
Errors are ConfigError, one line of the form `key: problem (got X, allowed Y)`.
"""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

NOT_GIVEN = object()  # None is a value that may be wrong


class ConfigError(ValueError):
    """A configuration that cannot be served: one line, naming key, value and what is allowed."""

    def __init__(self, key: str, problem: str, *, got: object = NOT_GIVEN, allowed: str | None = None) -> None:
        details = [f"got {got!r}"] if got is not NOT_GIVEN else []
        details += [f"allowed {allowed}"] if allowed is not None else []
        self.key, self.got = key, got
        super().__init__(f"{key}: {problem}" + (f" ({', '.join(details)})" if details else ""))


# --------------------------------------------------------------------------------------- the model


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched past the length the model was first trained on.

    kind "linear": positions / factor. kind "llama3": Llama 3.1's three bands. kind "yarn": NTK-by-parts
    (arXiv:2309.00071). kind "longrope": Phi-3's per-frequency factors (arXiv:2402.13753), the short list
    while the served length stays within the original one, else the long list. attention_factor multiplies cos and
    sin (yarn, longrope); whoever reads a checkpoint works out the published default where it names none.
    """

    kind: str
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    attention_factor: float = 1.0


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One Llama-family architecture. Sizes are counts of elements; `head_dim` is per head."""

    vocab_size: int
    n_layer: int
    n_head: int
    n_kv_head: int
    dim: int
    head_dim: int
    intermediate_size: int
    max_position: int
    norm_eps: float = 1e-5
    rope_base: float = 10000.0
    rope_dim: int = 0  # rotated elements of each head; 0 means all
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = False
    qkv_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    sliding_layers: tuple[int, ...] = ()  # layers the window applies to
    n_expert: int = 0  # 0: dense
    n_expert_per_token: int = 0
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    @property
    def kv_dim(self) -> int:
        return self.n_kv_head * self.head_dim

    @property
    def rotary_dim(self) -> int:
        return self.rope_dim or self.head_dim

    def kv_bytes_per_token(self, bytes_per_element: int) -> int:
        """Bytes one token occupies in the KV cache over all layers."""
        return 2 * self.n_layer * self.kv_dim * bytes_per_element

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "n_layer",
            "n_head",
            "n_kv_head",
            "dim",
            "head_dim",
            "intermediate_size",
            "max_position",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(name, "must be a positive whole number", got=value)
        if self.n_head % self.n_kv_head:
            raise ConfigError("n_kv_head", f"must divide n_head={self.n_head}", got=self.n_kv_head)
        if self.rotary_dim % 2 or self.rotary_dim > self.head_dim:
            raise ConfigError(
                "rope_dim", "must be even and within head_dim", got=self.rotary_dim, allowed=f"2..{self.head_dim}"
            )
        if self.n_expert and not 1 <= self.n_expert_per_token <= self.n_expert:
            raise ConfigError(
                "n_expert_per_token",
                "must be within the experts",
                got=self.n_expert_per_token,
                allowed=f"1..{self.n_expert}",
            )


# -------------------------------------------------------------------------- fields that say their bounds

Check = Callable[[str, object], None]  # of a key and its value; raises ConfigError


def checked(default: Any, *checks: Check) -> Any:
    """A dataclass field whose value `check_fields` holds to every check, in their order."""
    return field(default=default, metadata={"checks": checks})


def check_fields(values: Any, *, where: str = "") -> None:
    """Hold each field of a dataclass to its checks. where: stands before a field's name in the error."""
    for each in dataclasses.fields(values):
        for check in each.metadata.get("checks", ()):
            check(where + each.name, getattr(values, each.name))


def whole(low: int, high: int) -> Check:
    return lambda key, value: check_int(key, value, low, high)


def real(low: float, high: float) -> Check:
    return lambda key, value: check_float(key, value, low, high)


def one_of(*choices: str | None) -> Check:
    return lambda key, value: check_choice(key, value, choices)


def unless_none(check: Check) -> Check:
    return lambda key, value: None if value is None else check(key, value)


def switch(key: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ConfigError(key, "must be true or false", got=value)


def some_path(key: str, value: object) -> None:
    if not isinstance(value, str) or not value:
        raise ConfigError(key, "must be a path", got=value)


def above_zero(key: str, value: object) -> None:
    if value == 0:
        raise ConfigError(key, "must be above 0", got=value, allowed=f"0 < {key} <= 1")


# ------------------------------------------------------------------------------------- the service


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How an engine runs one model: what `handler:` in model_config.yaml holds, and the CLI's flags.

    checkpoint_path: a converted directory, or one weights file in it, which decides the quantization.
    dtype: what to compute in; "auto" is the checkpoint's own. kv_cache: element type of the cache; "auto" is bfloat16
        beside quantized weights on a CPU, which are rounded far more, else dtype; "int8" takes half of its bytes.
    kernels: "auto" takes the fused path where device and model have one, "plain" stays with PyTorch's operators.
    max_seq_len: positions a slot can hold, prompt and answer together; 0 means the model's own limit,
        at most 8192. max_num_seqs: slots, i.e. requests decoded together. kv_cache_gib: memory for them, which may
        hold fewer; 0 sets no bound but the machine's. A draft model's cache comes on top.
    draft_checkpoint_path: a smaller model of the same vocabulary, or the same model quantized, that proposes.
    speculate: who proposes: "draft", "ngram" (what followed last time), "auto" (both, by measurement) or "none";
        None is "draft" where a draft is named, else "none". speculate_k: proposals of one step at most; the engine
        takes fewer, or none, where that is faster.
    quality: thresholds that the checkpoint's recorded quality report must meet (quantize.gate); empty asks for none.
    """

    DTYPES = ("auto", "float32", "bfloat16", "float16")

    checkpoint_path: str = field(metadata={"checks": (some_path,)})
    dtype: str = checked("auto", one_of(*DTYPES))
    kv_cache: str = checked("auto", one_of(*DTYPES, "int8"))
    kernels: str = checked("auto", one_of("auto", "plain"))
    device: str = "auto"
    max_seq_len: int = checked(0, whole(0, 1 << 22))
    max_num_seqs: int = checked(8, whole(1, 256))
    kv_cache_gib: float = checked(0.0, real(0.0, 1 << 20))
    prefill_chunk: int = checked(256, whole(16, 8192))
    compile: bool = checked(False, switch)
    compile_prefill: bool = checked(False, switch)
    threads: int = checked(0, whole(0, 1024))  # 0: cores, less what TorchServe's front end needs when it serves
    draft_checkpoint_path: str | None = None
    speculate: str | None = checked(None, one_of(None, "none", "draft", "ngram", "auto"))
    speculate_k: int = checked(4, whole(1, 16))
    quality: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.speculate == "draft" and not self.draft_checkpoint_path:
            raise ConfigError("draft_checkpoint_path", "is required by speculate: draft")
        if self.draft_checkpoint_path is not None and not isinstance(self.draft_checkpoint_path, str):
            raise ConfigError("draft_checkpoint_path", "must be a path", got=self.draft_checkpoint_path)
        if not isinstance(self.quality, Mapping):
            raise ConfigError("quality", "must map thresholds to numbers", got=self.quality)
        if not isinstance(self.device, str) or not self.device:
            raise ConfigError("device", "must be a torch device", got=self.device, allowed="auto, cpu, cuda, mps")

    @property
    def proposers(self) -> tuple[str, ...]:
        """Who proposes: any of "draft" and "ngram"."""
        draft = ("draft",) if self.draft_checkpoint_path else ()
        return {None: draft, "none": (), "draft": draft, "ngram": ("ngram",), "auto": (*draft, "ngram")}[self.speculate]

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], *, where: str, also_known: Iterable[str] = ()) -> EngineConfig:
        """Build from parsed yaml; an unknown key is an error that lists the known ones, other readers' too."""
        known = [f.name for f in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                raise ConfigError(f"{where}.{key}", "unknown key", allowed=", ".join([*known, *sorted(also_known)]))
        if "checkpoint_path" not in values:
            raise ConfigError(f"{where}.checkpoint_path", "is required")
        return cls(**values)


# ------------------------------------------------------------------------------------- the request


class Guide(Protocol):
    """Says which tokens may come next. A guide follows one sequence: it may keep state between calls."""

    def allowed(self, output: Sequence[int]) -> bytes:
        """One byte a logit, 0 for the tokens that may not follow these. `output` only grows from call to call."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """What one request asks of the sampler. Neutral values leave the distribution as the model gave it.

    Order of application (as in vLLM and Hugging Face): penalties and bias, temperature, top_k, top_p, min_p.
    temperature 0 is argmax. top_k 0, top_p 1 and min_p 0 keep everything. seed None draws a fresh one.
    stop_token_ids end the answer as EOS does, and are no more part of its text, ignore_eos or not.
    """

    MAX_STOP = 16
    MAX_STOP_CHARS = 256
    MAX_STOP_TOKENS = 64
    MAX_LOGPROBS = 20

    max_new_tokens: int = checked(256, whole(1, 1 << 22))
    temperature: float = checked(0.0, real(0.0, 100.0))
    top_k: int = checked(0, whole(0, 1 << 24))
    top_p: float = checked(1.0, real(0.0, 1.0), above_zero)
    min_p: float = checked(0.0, real(0.0, 1.0))
    seed: int | None = checked(None, unless_none(whole(-(1 << 63), (1 << 63) - 1)))
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = checked(False, switch)
    min_tokens: int = 0
    repetition_penalty: float = checked(1.0, real(0.01, 100.0))
    presence_penalty: float = checked(0.0, real(-2.0, 2.0))
    frequency_penalty: float = checked(0.0, real(-2.0, 2.0))
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    # None: none; n: the chosen token's and the n best
    logprobs: int | None = checked(None, unless_none(whole(0, MAX_LOGPROBS)))
    prompt_logprobs: int | None = checked(None, unless_none(whole(0, MAX_LOGPROBS)))  # of the prompt's tokens
    guide: Guide | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        check_fields(self)
        check_int("min_tokens", self.min_tokens, 0, self.max_new_tokens)
        self._check_logit_bias()
        self._check_stop()

    @cached_property
    def bias_arrays(self) -> tuple[array[int], array[float]]:
        """logit_bias as int64 ids and float32 values: thousands of entries cost a step no more than a few."""
        return array("q", self.logit_bias), array("f", self.logit_bias.values())

    def _check_logit_bias(self) -> None:
        if not isinstance(self.logit_bias, Mapping):
            raise ConfigError("logit_bias", "must map token ids to numbers", got=self.logit_bias)
        for token, bias in self.logit_bias.items():
            check_int("logit_bias", token, 0, (1 << 31) - 1)
            check_float(f"logit_bias[{token}]", bias, -100.0, 100.0)

    def _check_stop(self) -> None:
        if not isinstance(self.stop_token_ids, tuple | list) or len(self.stop_token_ids) > self.MAX_STOP_TOKENS:
            allowed = f"at most {self.MAX_STOP_TOKENS}"
            raise ConfigError("stop_token_ids", "must be a list of token ids", got=self.stop_token_ids, allowed=allowed)
        for token in self.stop_token_ids:
            check_int("stop_token_ids", token, 0, (1 << 31) - 1)
        if not isinstance(self.stop, tuple | list):
            raise ConfigError("stop", "must be a list of strings", got=self.stop)
        if len(self.stop) > self.MAX_STOP:
            raise ConfigError("stop", "too many stop strings", got=len(self.stop), allowed=f"at most {self.MAX_STOP}")
        for text in self.stop:
            if not isinstance(text, str) or not 0 < len(text) <= self.MAX_STOP_CHARS:
                allowed = f"1..{self.MAX_STOP_CHARS} characters"
                raise ConfigError("stop", "each must be a non-empty string", got=text, allowed=allowed)


def check_int(key: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ConfigError(key, "must be a whole number in range", got=value, allowed=f"{low}..{high}")


def check_float(key: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:  # NaN: neither
        raise ConfigError(key, "must be a number in range", got=value, allowed=f"{low}..{high}")


def check_choice(key: str, value: object, choices: tuple[str | None, ...]) -> None:
    if value not in choices:
        raise ConfigError(key, "unknown value", got=value, allowed=", ".join(c for c in choices if c is not None))
