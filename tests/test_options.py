"""What an editor shows for Engine.load and Engine.stream is what they take."""

import dataclasses
import inspect
from typing import Unpack, get_type_hints

import pytest

from gpt_fast.config import EngineConfig, SamplingParams
from gpt_fast.llm import Engine
from gpt_fast.options import EngineOptions, SamplingOptions


@pytest.mark.parametrize(
    ("options", "config", "besides"),
    [(EngineOptions, EngineConfig, {"checkpoint_path"}), (SamplingOptions, SamplingParams, set())],
)
def test_the_options_are_the_configuration_s_fields(options, config, besides):
    hints = get_type_hints(config)
    assert get_type_hints(options) == {
        field.name: hints[field.name] for field in dataclasses.fields(config) if field.name not in besides
    }


@pytest.mark.parametrize(("method", "options"), [(Engine.load, EngineOptions), (Engine.stream, SamplingOptions)])
def test_the_methods_name_their_options(method, options):
    by_name = list(inspect.signature(method).parameters.values())[-1]
    assert by_name.kind is inspect.Parameter.VAR_KEYWORD
    assert get_type_hints(method)[by_name.name] == Unpack[options]


def test_an_option_that_does_not_exist_is_named():
    with pytest.raises(TypeError, match="max_sequence_len"):
        Engine.load("checkpoint", max_sequence_len=1)
