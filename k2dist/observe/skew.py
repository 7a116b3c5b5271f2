"""How unevenly the router loads ranks and experts, over the last minute or so. Pure.

    over ranks     rows of the busiest rank / rows of a rank on average: what a layer waits for
    over experts   rows of the busiest slot / rows of a slot on average

Each is averaged over the MoE layers. 1: perfectly even.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from k2dist.observe.state import LayerLoad, RankView

_EVEN = 1.0


class Skew(NamedTuple):
    over_ranks: float
    over_experts: float


class SkewWindow:
    """Told of all ranks now and then; gives the skew since the last time before `window_s` ago.

    A slot's peak since the start is all that is known of experts, so their skew is since the start.
    """

    def __init__(self, window_s: float = 60.0) -> None:
        self._window_s = window_s
        self._seen: deque[tuple[float, list[list[int]]]] = deque()  # rows [rank][layer]

    def note(self, ranks: Sequence[RankView], now_s: float) -> Skew | None:
        """None where no expert has computed anything."""
        rows = [[layer.num_rows for layer in rank.layers] for rank in ranks]
        if self._seen and (_shape(rows) != _shape(self._seen[-1][1]) or _has_fallen(self._seen[-1][1], rows)):
            self._seen.clear()  # another layout, or a rank began anew
        self._seen.append((now_s, rows))
        while len(self._seen) > 2 and self._seen[1][0] <= now_s - self._window_s:
            self._seen.popleft()
        first = self._seen[0][1]
        fresh = [[b - a for a, b in zip(old, new, strict=True)] for old, new in zip(first, rows, strict=True)]
        if not any(map(any, fresh)):
            fresh = rows
        if not any(map(any, fresh)):
            return None
        return Skew(_over_ranks(fresh), _over_experts([rank.layers for rank in ranks if rank.layers]))


def _over_ranks(rows: list[list[int]]) -> float:
    layers = [layer for layer in zip(*(rank for rank in rows if rank), strict=True) if sum(layer)]
    return sum(max(layer) * len(layer) / sum(layer) for layer in layers) / len(layers) if layers else _EVEN


def _over_experts(ranks: Sequence[Sequence[LayerLoad]]) -> float:
    skews = []
    for layer in zip(*ranks, strict=True):
        num_rows, num_slots = sum(r.num_rows for r in layer), sum(r.num_slots for r in layer)
        if num_rows:
            skews.append(max(r.num_rows_peak for r in layer) * num_slots / num_rows)
    return sum(skews) / len(skews) if skews else _EVEN


def _shape(rows: list[list[int]]) -> list[int]:
    return [len(rank) for rank in rows]


def _has_fallen(old: list[list[int]], new: list[list[int]]) -> bool:
    return any(
        b < a for before, after in zip(old, new, strict=True) for a, b in zip(before, after, strict=True)
    )
