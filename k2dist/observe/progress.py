"""Whether steps advance while there is work: what a health check has to know of a lane. Pure.

A lane that hangs in a collective answers every question and computes nothing; only its count of steps tells.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class LaneWork(NamedTuple):
    lane: int
    num_steps: int  # since it began
    has_work: bool


class Stall(NamedTuple):
    lane: int
    since_s: float  # how long it has had work and made no step


class Progress:
    """Compares what lanes say with what they said before; two looks `stall_s` apart see a stall."""

    def __init__(self, stall_s: float) -> None:
        self.stall_s = stall_s
        self._seen: dict[int, tuple[int, float]] = {}  # lane -> its steps, and since when it had work at them

    def look(self, lanes: Iterable[LaneWork], now_s: float) -> tuple[Stall, ...]:
        """Lanes that have had work for `stall_s` without a step."""
        seen: dict[int, tuple[int, float]] = {}
        for lane in lanes:
            before = self._seen.get(lane.lane)
            if lane.has_work:
                is_same = before is not None and before[0] == lane.num_steps
                seen[lane.lane] = before if is_same and before is not None else (lane.num_steps, now_s)
        self._seen = seen
        return tuple(
            Stall(lane, now_s - since_s)
            for lane, (_, since_s) in sorted(seen.items())
            if now_s - since_s >= self.stall_s
        )
