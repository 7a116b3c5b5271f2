"""Gumbel noise from counters: the same on every device, in every batch."""

from __future__ import annotations

import torch
from torch import Tensor

from k2dist.model.sampler.rows import RowSampling
from k2dist.model.transfer import indices

NUM_BITS = 52

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
_ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))


def gumbel(id_C: Tensor, state_N1: Tensor) -> Tensor:
    """Float64 [N, C], standard Gumbel; each a function of its token id and its row's state alone.

    id_C: int64 [C], or [N, C] where the rows have different ids.
    """
    return gumbel_of(bits(id_C, state_N1))


def gumbel_of(bits_NC: Tensor) -> Tensor:
    return uniform_of(bits_NC).log_().neg_().log_().neg_()


def uniform_of(bits_NC: Tensor) -> Tensor:
    """Float64 in (0, 1), ends excluded.

    52 bits and a half: with 53 the largest would round to 1, and its noise to infinity.
    """
    return bits_NC.double().add_(0.5).mul_(2.0**-NUM_BITS)


def bits(id_C: Tensor, state_N1: Tensor) -> Tensor:
    """Int64 [N, C], each of `NUM_BITS` random bits; more bits, more noise.

    Output number `id` of a SplitMix64 generator (Steele et al. 2014, doi:10.1145/2660193.2660195) whose state
    is itself mixed from the counters, so that streams of neighbouring positions have nothing in common.
    """
    x_NC = (id_C + 1) * _signed(_GOLDEN) + state_N1  # int64 wraps as unsigned numbers do
    shifted_NC = torch.empty_like(x_NC)
    for num_bits, factor in _ROUNDS:
        torch.bitwise_right_shift(x_NC, num_bits, out=shifted_NC)
        x_NC ^= shifted_NC.bitwise_and_(_MASK >> num_bits)  # torch's shift copies the sign
        x_NC *= _signed(factor)
    return x_NC.bitwise_right_shift_(64 - NUM_BITS).bitwise_and_(2**NUM_BITS - 1)


def states(rows: list[RowSampling], device: torch.device) -> Tensor:
    """Int64 [N, 1]: the generators' states."""
    values = [_signed(state(row.sampling.seed, row.output_index, row.position)) for row in rows]
    return indices(values, device).view(-1, 1)


def state(seed: int, output_index: int, position: int) -> int:
    """64 bits that seed one row's generator."""
    mixed = seed & _MASK
    for counter in (output_index, position):
        mixed = _mix(mixed + (counter + 1) * _GOLDEN)
    return mixed


def _mix(x: int) -> int:
    """SplitMix64's finaliser on a 64-bit integer."""
    x &= _MASK
    for num_bits, factor in _ROUNDS:
        x = ((x ^ (x >> num_bits)) * factor) & _MASK
    return x


def _signed(x: int) -> int:
    """The int64 with the same 64 bits."""
    return x - 2**64 if x >= 2**63 else x
