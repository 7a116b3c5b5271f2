"""What this device does at most, measured in the run whose figures are divided by it."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from k2dist.messages import Message

_NUM_TRIES = 5
_LARGE_BYTES = {"cpu": 2**29, "cuda": 2**32}  # much more than any cache
_MATRIX_SIZE = {"cpu": 2048, "cuda": 8192}
_FLOAT8_CAPABILITY = (8, 9)  # tensor cores from here on take float8 at twice the rate of bfloat16


class Ceilings(Message, frozen=True, kw_only=True):
    """The best of a few tries each, with all threads."""

    read_bytes_per_s: float  # a sum over much memory
    copy_bytes_per_s: float  # bytes read and bytes written together
    bf16_flops_per_s: float  # a large matrix product; a multiply-add counts two
    float8_flops_per_s: (
        float  # not measured: twice that of bfloat16 where the hardware has float8, else equal
    )


def measure_ceilings(device: torch.device) -> Ceilings:
    num_bytes, size = _LARGE_BYTES[device.type], _MATRIX_SIZE[device.type]
    x = torch.ones(num_bytes // 4, device=device)
    y = torch.empty_like(x)
    read_s = _fastest_s(x.sum, device)
    copy_s = _fastest_s(lambda: y.copy_(x), device)
    a = torch.randn(size, size, device=device).to(torch.bfloat16)
    product_s = _fastest_s(lambda: a @ a, device)
    bf16 = 2 * size**3 / product_s
    has_float8 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= _FLOAT8_CAPABILITY
    return Ceilings(
        read_bytes_per_s=num_bytes / read_s,
        copy_bytes_per_s=2 * num_bytes / copy_s,
        bf16_flops_per_s=bf16,
        float8_flops_per_s=2 * bf16 if has_float8 else bf16,
    )


def best_of(one: Ceilings, other: Ceilings) -> Ceilings:
    """What something else on the machine took from one measurement, the other may have had."""
    return Ceilings(
        read_bytes_per_s=max(one.read_bytes_per_s, other.read_bytes_per_s),
        copy_bytes_per_s=max(one.copy_bytes_per_s, other.copy_bytes_per_s),
        bf16_flops_per_s=max(one.bf16_flops_per_s, other.bf16_flops_per_s),
        float8_flops_per_s=max(one.float8_flops_per_s, other.float8_flops_per_s),
    )


def _fastest_s(work: Callable[[], object], device: torch.device) -> float:
    fastest_s = float("inf")
    for _ in range(_NUM_TRIES):
        _finish(device)
        began_s = time.perf_counter()
        work()
        _finish(device)
        fastest_s = min(fastest_s, time.perf_counter() - began_s)
    return fastest_s


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
