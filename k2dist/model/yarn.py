"""Rotary angles with YaRN's stretching, in float32, and their cosines and sines as a table.

    inv_freq[i] = theta^(-2i/R) * [(1 - ramp(i)) + ramp(i) / factor],  angle = position * inv_freq[i]

ramp rises from 0 to 1 between the pairs that turn `beta_fast` and `beta_slow` times in the original context;
for K2 (1 and 1) it is a hard step between pairs 19 and 20. Applied at every length, not only beyond the
original context: the weights were trained so. The order of operations is the published code's, since at
position 100,000 a last bit of inv_freq is a hundredth of a radian.

P positions, R rotary width, F = R / 2 pairs.
Source: Peng et al. 2023, arXiv:2309.00071, section 3.2; k2_facts 2.4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from k2dist.config import Architecture, Yarn


@dataclass(frozen=True, slots=True)
class RopeTable:
    """Cosine and sine of every position's angles, float32: a row's have the same bits in any batch."""

    cos_PF: Tensor
    sin_PF: Tensor

    def at(self, position_T: Tensor) -> tuple[Tensor, Tensor]:
        return self.cos_PF[position_T], self.sin_PF[position_T]


def rope_table(architecture: Architecture, num_positions: int) -> RopeTable:
    """Positions 0 .. num_positions - 1, times YaRN's attention factor (1 for K2)."""
    position_P = torch.arange(num_positions, dtype=torch.float32)
    angle_PF = position_P[:, None] * inv_freq(architecture)
    factor = _attention_factor(architecture.yarn)
    return RopeTable(angle_PF.cos() * factor, angle_PF.sin() * factor)


def inv_freq(architecture: Architecture) -> Tensor:
    """Float32 [F], in radians per position."""
    width, theta, yarn = architecture.qk_rope_head_dim, architecture.rope_theta, architecture.yarn
    period_F = theta ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    plain_F = 1.0 / period_F
    if yarn is None:
        return plain_F
    low = max(math.floor(_pair_turning(yarn.beta_fast, yarn, width, theta)), 0)
    high = min(math.ceil(_pair_turning(yarn.beta_slow, yarn, width, theta)), width - 1)
    span = high - low if high != low else 0.001
    ramp_F = ((torch.arange(width // 2, dtype=torch.float32) - low) / span).clamp(0.0, 1.0)
    plain_share_F = 1.0 - ramp_F
    return 1.0 / (yarn.factor * period_F) * (1.0 - plain_share_F) + plain_F * plain_share_F


def _pair_turning(turns: float, yarn: Yarn, width: int, theta: float) -> float:
    """The pair, as a fraction, that turns `turns` times in the original context."""
    context = yarn.original_max_positions
    return width * math.log(context / (turns * 2.0 * math.pi)) / (2.0 * math.log(theta))


def _attention_factor(yarn: Yarn | None) -> float:
    if yarn is None:
        return 1.0
    return _temperature(yarn.factor, yarn.mscale) / _temperature(yarn.factor, yarn.mscale_all_dim)


def _temperature(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1.0 else 1.0
