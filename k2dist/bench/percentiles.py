"""How values are spread, in their own unit: what users wait for, mostly. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from k2dist.messages import Message


class Percentiles(Message, frozen=True, kw_only=True):
    """Of `count` values; zeros where there are none."""

    count: int
    mean: float = 0.0
    p50: float = 0.0
    p90: float = 0.0
    p95: float = 0.0
    p99: float = 0.0
    max: float = 0.0

    @classmethod
    def of(cls, values: Sequence[float]) -> Percentiles:
        if not len(values):
            return cls(count=0)
        p50, p90, p95, p99 = (float(value) for value in np.percentile(values, (50, 90, 95, 99)))
        mean, most = float(np.mean(values)), float(np.max(values))
        return cls(count=len(values), mean=mean, p50=p50, p90=p90, p95=p95, p99=p99, max=most)
