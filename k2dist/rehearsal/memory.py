"""Bytes on the rehearsed device: what is free, what a value holds, and how much a while needs at its peak."""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
from torch import Tensor

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc(5): sets the peak of resident memory to what it is now
# Of what is free now, what may be used: a machine that swaps tells nothing about a rank.
_USABLE = {"cpu": 0.8, "cuda": 0.95}


def usable_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        free_bytes, _ = torch.cuda.mem_get_info(device)
    else:
        free_bytes = psutil.virtual_memory().available
    return int(free_bytes * _USABLE[device.type])


def held_bytes(value: object) -> int:
    """Of every tensor in a tree of dataclasses, tuples and lists. Weights are never held in two places."""
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, (tuple, list)):
        return sum(map(held_bytes, value))
    if dataclasses.is_dataclass(value):
        return sum(held_bytes(getattr(value, field.name)) for field in dataclasses.fields(value))
    return 0


@dataclasses.dataclass(slots=True)
class Peak:
    """`num_bytes` beyond what was in use at the beginning; None where the machine does not say."""

    num_bytes: int | None = None


@contextmanager
def peak_of(device: torch.device) -> Iterator[Peak]:
    """Known once the context is left. On a CPU: of the process, as Linux counts it."""
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        peak.num_bytes = torch.cuda.max_memory_allocated(device) - before
    elif _CLEAR_REFS.exists():
        _give_back()
        _CLEAR_REFS.write_text(_RESET_PEAK)
        before = _resident_bytes("VmRSS:")
        yield peak
        peak.num_bytes = max(_resident_bytes("VmHWM:") - before, 0)
    else:
        yield peak


def _give_back() -> None:
    """What the C library keeps of freed memory would hide as much of the peak."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's own
    if trim is not None:
        trim(0)


def _resident_bytes(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024
