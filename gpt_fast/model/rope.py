"""Rotary position embeddings: the table of rotations, the published ways to stretch it, the rotation.

Shapes: B rows, S tokens of a row, H heads, E head_dim (in tables half the rotated dims), P positions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gpt_fast.config import ModelConfig, RopeScaling


def apply_rope(x_BSHE: Tensor, rope_BS2E: Tensor) -> Tensor:
    """Rotate neighbouring pairs of the first `rotary_dim` elements of each head (RoFormer, arXiv:2104.09864)."""
    cos_BS1E, sin_BS1E = rope_BS2E[:, :, None, 0], rope_BS2E[:, :, None, 1]
    rotary = 2 * cos_BS1E.shape[-1]
    pairs = x_BSHE[..., :rotary].float().unflatten(-1, (-1, 2))
    even, odd = pairs[..., 0], pairs[..., 1]
    rotated = torch.stack((even * cos_BS1E - odd * sin_BS1E, odd * cos_BS1E + even * sin_BS1E), dim=-1)
    rotated = rotated.flatten(-2).type_as(x_BSHE)
    return rotated if rotary == x_BSHE.shape[-1] else torch.cat((rotated, x_BSHE[..., rotary:]), dim=-1)


def rope_table(config: ModelConfig, positions: int) -> Tensor:
    """cos and sin of every position's angles: float32 [positions, 2, rotary_dim / 2]."""
    exponent_E = torch.arange(0, config.rotary_dim, 2, dtype=torch.float64) / config.rotary_dim
    frequency_E = config.rope_base**-exponent_E
    scale = 1.0
    if config.rope_scaling is not None:
        frequency_E, scale = scaled_frequencies(frequency_E, config.rope_scaling, config, positions)
    angle_PE = torch.arange(positions, dtype=torch.float64)[:, None] * frequency_E
    return (torch.stack((angle_PE.cos(), angle_PE.sin()), dim=1) * scale).float()


def scaled_frequencies(
    frequency_E: Tensor, scaling: RopeScaling, config: ModelConfig, positions: int
) -> tuple[Tensor, float]:
    """Stretched frequencies, and the factor on cos and sin. One branch a published scheme; see RopeScaling."""
    if scaling.kind == "linear":
        return frequency_E / scaling.factor, 1.0
    if scaling.kind == "llama3":
        wavelength_E = 2 * math.pi / frequency_E
        ratio_E = scaling.original_max_position / wavelength_E
        smooth_E = (ratio_E - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        smooth_E = smooth_E.clamp(0, 1)
        return frequency_E * (smooth_E + (1 - smooth_E) / scaling.factor), 1.0
    if scaling.kind == "yarn":
        return yarn_frequencies(frequency_E, scaling, config), scaling.attention_factor
    # longrope: which list applies depends on the served length, fixed when the table is made.
    long = positions - 1 > scaling.original_max_position
    factor_E = torch.tensor(scaling.long_factor if long else scaling.short_factor, dtype=torch.float64)
    return frequency_E / factor_E, scaling.attention_factor


def yarn_frequencies(frequency_E: Tensor, scaling: RopeScaling, config: ModelConfig) -> Tensor:
    """NTK-by-parts (arXiv:2309.00071, eq. 23): fast dimensions keep their frequency, slow ones are divided."""

    def dimension(rotations: float) -> float:
        position = scaling.original_max_position / (rotations * 2 * math.pi)
        return config.rotary_dim * math.log(position) / (2 * math.log(config.rope_base))

    low = max(math.floor(dimension(scaling.beta_fast)), 0)
    high = min(math.ceil(dimension(scaling.beta_slow)), config.rotary_dim - 1)
    ramp_E = (torch.arange(len(frequency_E), dtype=torch.float64) - low) / max(high - low, 1e-3)
    keep_E = 1 - ramp_E.clamp(0, 1)
    return frequency_E * keep_E + frequency_E / scaling.factor * (1 - keep_E)
