"""Counts by size, as Prometheus wants them, in plain numbers that can cross a process. Pure."""

from __future__ import annotations

from bisect import bisect_left

from k2dist.messages import Message


class HistogramFacts(Message, frozen=True, kw_only=True):
    """`counts[i]`: values in (bounds[i-1], bounds[i]]; the last one, of what is above all bounds."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float  # of all values together


class Histogram:
    """`bounds`: ascending."""

    __slots__ = ("_bounds", "_counts", "_total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        assert list(bounds) == sorted(set(bounds)), f"not ascending: {bounds}"
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        """`value`, `count` times."""
        self._counts[bisect_left(self._bounds, value)] += count
        self._total += value * count

    def facts(self) -> HistogramFacts:
        return HistogramFacts(bounds=self._bounds, counts=tuple(self._counts), total=self._total)
