"""How long a call takes with cold caches: the median of several, each after much was written elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

FLUSH_BYTES = {"cuda": 256 << 20, "cpu": 64 << 20}  # several times the last cache
LEAST_CALLS, MOST_CALLS = 5, 50


@dataclass(frozen=True, slots=True)
class Clock:
    """Times calls on one device for about `case_s` seconds each."""

    device: torch.device
    case_s: float

    def median_s(self, call: Callable[[], object]) -> float:
        """Seconds of one call. The first two are not counted: they compile, allocate and fault pages in."""
        for _ in range(2):
            once_s = self._once_s(call, None)
        flushed = torch.zeros(FLUSH_BYTES[self.device.type], dtype=torch.uint8, device=self.device)
        num_calls = min(MOST_CALLS, max(LEAST_CALLS, int(self.case_s / max(once_s, 1e-6))))
        return median(self._once_s(call, flushed) for _ in range(num_calls))

    def _once_s(self, call: Callable[[], object], flushed: Tensor | None) -> float:
        if flushed is not None:
            flushed.zero_()
        if self.device.type == "cpu":
            start_s = time.perf_counter()
            call()
            return time.perf_counter() - start_s
        # The host enqueues while the device still writes: its own time is hidden where that is enough.
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000
