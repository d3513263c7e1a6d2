"""Configuration is checked on the way in, and every error is one line that names key, value and limit."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt_fast.config import ConfigError, EngineConfig, ModelConfig, SamplingParams

MODEL = {
    "vocab_size": 8,
    "n_layer": 1,
    "n_head": 4,
    "n_kv_head": 2,
    "dim": 16,
    "head_dim": 4,
    "intermediate_size": 8,
    "max_position": 32,
}
NOT_NUMBERS = [None, "1", [1], {}, math.nan, math.inf, -math.inf, True]


def problem(build, **values):
    with pytest.raises(ConfigError) as caught:
        build(**values)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("key", MODEL)
@pytest.mark.parametrize("value", [0, -1, 1.0, *NOT_NUMBERS])
def test_model_sizes(key, value):
    message = problem(ModelConfig, **{**MODEL, key: value})
    assert message.startswith(f"{key}: ") and f"got {value!r}" in message


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"n_kv_head": 3}, "n_kv_head"),
        ({"rope_dim": 3}, "rope_dim"),
        ({"rope_dim": 6}, "rope_dim"),
        ({"head_dim": 5}, "rope_dim"),
        ({"n_expert": 4}, "n_expert_per_token"),
        ({"n_expert": 4, "n_expert_per_token": 5}, "n_expert_per_token"),
    ],
)
def test_model_sizes_that_do_not_fit_together(values, key):
    assert problem(ModelConfig, **{**MODEL, **values}).startswith(f"{key}: ")


def test_model_derived_sizes():
    config = ModelConfig(**MODEL)
    assert (config.kv_dim, config.rotary_dim, config.kv_bytes_per_token(2)) == (8, 4, 32)
    assert ModelConfig(**MODEL, rope_dim=2).rotary_dim == 2


ENGINE_LIMITS = {
    "max_seq_len": (0, 1 << 22),
    "max_num_seqs": (1, 256),
    "prefill_chunk": (16, 8192),
    "threads": (0, 1024),
}


@pytest.mark.parametrize("key", ENGINE_LIMITS)
def test_engine_numbers(key):
    low, high = ENGINE_LIMITS[key]
    for value in (low, high):
        assert getattr(EngineConfig(checkpoint_path="x", **{key: value}), key) == value
    for value in (low - 1, high + 1, 16.0, *NOT_NUMBERS):
        message = problem(EngineConfig, checkpoint_path="x", **{key: value})
        assert message == f"{key}: must be a whole number in range (got {value!r}, allowed {low}..{high})"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("dtype", "int8"),
        ("dtype", None),
        ("dtype", []),
        ("compile", 1),
        ("compile_prefill", "yes"),
        ("checkpoint_path", ""),
        ("checkpoint_path", None),
        ("device", ""),
        ("device", 0),
        ("kv_cache_gib", -1),
        ("kv_cache_gib", "1"),
        ("kv_cache_gib", float("nan")),
    ],
)
def test_engine_values(key, value):
    assert problem(EngineConfig, **{"checkpoint_path": "x", key: value}).startswith(f"{key}: ")


@given(
    key=st.sampled_from([f.name for f in dataclasses.fields(EngineConfig)]),
    value=st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.lists(st.integers()),
)
def test_any_mutation_of_an_engine_configuration_is_accepted_or_named(key, value):
    good = dataclasses.asdict(EngineConfig(checkpoint_path="x"))
    try:
        config = EngineConfig.from_mapping({**good, key: value}, where="handler")
    except ConfigError as error:
        assert str(error).split(":")[0].endswith(key)
    else:
        assert dataclasses.asdict(config)[key] == value
        assert EngineConfig.from_mapping(dataclasses.asdict(config), where="handler") == config


def test_engine_keys():
    message = problem(lambda **v: EngineConfig.from_mapping(v, where="handler"), checkpoint_path="x", max_batch=3)
    assert message.startswith("handler.max_batch: unknown key") and "max_num_seqs" in message
    assert problem(lambda **v: EngineConfig.from_mapping(v, where="handler")) == "handler.checkpoint_path: is required"


SAMPLING_LIMITS = {
    "temperature": (0.0, 100.0),
    "top_k": (0, 1 << 24),
    "top_p": (1e-9, 1.0),
    "min_p": (0.0, 1.0),
    "max_new_tokens": (1, 1 << 22),
    "seed": (-(1 << 63), (1 << 63) - 1),
    "repetition_penalty": (0.01, 100.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "logprobs": (0, 20),
    "min_tokens": (0, 256),
}


@pytest.mark.parametrize("key", SAMPLING_LIMITS)
def test_sampling_numbers(key):
    low, high = SAMPLING_LIMITS[key]
    for value in (low, high):
        assert getattr(SamplingParams(**{key: value}), key) == value
    for value in (low - 1, high + 1, 10**400, *NOT_NUMBERS):
        if value is not None or key not in ("seed", "logprobs"):
            message = problem(SamplingParams, **{key: value})
            assert message.startswith(f"{key}: ") and "got " in message


@pytest.mark.parametrize(
    "stop", ["END", [1], ["a"] * 17, [""], ["x" * 257], [None], 5, {"a": 1}], ids=lambda s: str(s)[:12]
)
def test_stop_strings(stop):
    assert problem(SamplingParams, stop=stop).startswith("stop: ")


def test_stop_strings_in_range():
    assert SamplingParams(stop=("a",) * 16).stop == ("a",) * 16
    assert SamplingParams(stop=["x" * 256]).stop == ["x" * 256]


@pytest.mark.parametrize(
    "bias", [{"5": 1.0}, {5: "1"}, {5: math.nan}, {5: math.inf}, {5: 101}, {True: 1.0}, [5], None, {5: None}], ids=str
)
def test_logit_bias(bias):
    assert problem(SamplingParams, logit_bias=bias).startswith("logit_bias")


@pytest.mark.parametrize("value", [1, "yes", None])
def test_ignore_eos(value):
    assert problem(SamplingParams, ignore_eos=value).startswith("ignore_eos: ")


@pytest.mark.parametrize(
    ("wanted", "device", "spare", "interval"),
    [
        (None, "cpu", 0, 0.1),
        (None, "cpu", 1, 0.02),
        (None, "cuda:0", 0, 0.02),
        (0.0, "cpu", 0, 0.0),
        (0.3, "cpu", 1, 0.3),
    ],
)
def test_chunks_of_a_stream_leave_the_engine_its_cores(wanted, device, spare, interval):
    from gpt_fast.serve.startup import available_cores, chunk_interval

    assert chunk_interval(wanted, device=device, threads=available_cores() - spare) == interval
