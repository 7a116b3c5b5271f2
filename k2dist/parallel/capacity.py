"""How much room the frames of a padded exchange have: pure, so that a plan can say what they cost."""

from __future__ import annotations

import math
from dataclasses import dataclass

from k2dist.config.architecture import Architecture
from k2dist.parallel.layout import Layout

# e^-16: how likely an even load may overflow its frame by chance. A step of K2 on 16 ranks fills 15,360
# frames (60 layers, 16 x 16), each with rows and with pairs, so fewer than one in 250 is repeated.
_CHANCE_EXPONENT = 16.0


@dataclass(frozen=True, slots=True)
class Capacity:
    """Room in a frame. The same on all ranks of a step."""

    rows: int
    pairs: int  # of row and expert

    def __post_init__(self) -> None:
        assert self.rows > 0, f"room for {self.rows} rows"
        assert self.pairs > 0, f"room for {self.pairs} pairs"


@dataclass(frozen=True, slots=True)
class CapacityRule:
    """How much room the frames of a step have; from what all ranks know alike.

    `factor`: how many times an even router's load may fall on a rank; its chance spread is added to that.
    `largest_share`: of all experts, on the rank that holds most. Room is never more than could be filled, and
    for few rows that is what there is: then nothing can overflow.
    """

    factor: float
    top_k: int
    largest_share: float

    @classmethod
    def of(cls, architecture: Architecture, layout: Layout, factor: float) -> CapacityRule:
        """For `layout`. Copies of an expert share its load, and yet each has room for all of it."""
        most_slots = max(len(slots) for place in layout.ranks for slots in place.experts)
        return cls(factor, architecture.top_k, most_slots / architecture.num_experts)

    def capacity(self, num_rows: int) -> Capacity:
        """`num_rows`: the most that any rank dispatches in this step."""
        share = min(self.largest_share, 1.0)
        even_rows = num_rows * (1.0 - (1.0 - share) ** self.top_k)
        even_pairs = num_rows * self.top_k * share
        return Capacity(
            min(num_rows, _room(self.factor * even_rows)),
            min(num_rows * self.top_k, _room(self.factor * even_pairs)),
        )


def _room(load: float) -> int:
    """That so many on average overflow with a chance below e^-16: Bernstein's bound on a Poisson tail."""
    third = _CHANCE_EXPONENT / 3
    return math.ceil(load + third + math.sqrt(third**2 + 2 * _CHANCE_EXPONENT * load))
