"""The least time that each part of a step can take: its bytes and operations over the measured ceilings."""

from __future__ import annotations

from collections.abc import Sequence

from k2kernels.bench.ceilings import Ceilings
from k2kernels.cost import Cost

from k2dist.config import Architecture
from k2dist.planner.work import LaneWork, Part, Sort, Traffic, Work, expert_work, lane_work


class Floor:
    """Of one rank of `architecture` at `tp`, against `ceilings`."""

    def __init__(self, architecture: Architecture, tp: int, return_bytes: int, ceilings: Ceilings) -> None:
        self._a = architecture
        self._tp = tp
        self._return_bytes = return_bytes  # of one element of an expert's output
        self._ceilings = ceilings

    def parts_s(self, work: LaneWork, traffic: Sequence[Traffic]) -> dict[Part, float]:
        """Seconds of each part of a step; 0 where nothing is known that it must do."""
        floor_s = dict.fromkeys(Part, 0.0)
        for one in lane_work(self._a, self._tp, work):
            floor_s[one.part] += one.times * self._longer_s(one)
        for layer in traffic:
            for one in expert_work(self._a, self._return_bytes, layer):
                floor_s[one.part] += one.times * self._longer_s(one)
        return floor_s

    def _longer_s(self, work: Work) -> float:
        """Of moving its bytes and doing its operations."""
        if work.sort is Sort.MOVE:
            return work.num_bytes / (self._ceilings.copy_gb_s * 1e9)
        is_e4m3 = work.sort in (Sort.FLOAT8, Sort.GROUPED)
        floor_s, _ = self._ceilings.floor_s(
            Cost(round(work.num_bytes), round(work.num_flops)), is_e4m3=is_e4m3
        )
        return floor_s
