"""What this device does at most, measured in the run whose figures are divided by it."""

from __future__ import annotations

import torch
from k2kernels.bench.ceilings import measure_ceilings as measure
from k2kernels.bench.timing import Clock

from k2dist.messages import Message

_CASE_S = 0.5  # for each ceiling


class Ceilings(Message, frozen=True, kw_only=True):
    """As `k2kernels.bench` measures them."""

    read_bytes_per_s: float
    copy_bytes_per_s: float  # bytes read and bytes written together
    bf16_flops_per_s: float  # a multiply-add counts two
    float8_flops_per_s: (
        float  # not measured: twice that of bfloat16 where the hardware has float8, else equal
    )


def measure_ceilings(device: torch.device) -> Ceilings:
    found = measure(Clock(device, _CASE_S))
    bf16 = found.bfloat16_tflop_s * 1e12
    return Ceilings(
        read_bytes_per_s=found.read_gb_s * 1e9,
        copy_bytes_per_s=found.copy_gb_s * 1e9,
        bf16_flops_per_s=bf16,
        float8_flops_per_s=bf16 * found.e4m3_factor,
    )


def best_of(one: Ceilings, other: Ceilings) -> Ceilings:
    """What something else on the machine took from one measurement, the other may have had."""
    return Ceilings(
        read_bytes_per_s=max(one.read_bytes_per_s, other.read_bytes_per_s),
        copy_bytes_per_s=max(one.copy_bytes_per_s, other.copy_bytes_per_s),
        bf16_flops_per_s=max(one.bf16_flops_per_s, other.bf16_flops_per_s),
        float8_flops_per_s=max(one.float8_flops_per_s, other.float8_flops_per_s),
    )
