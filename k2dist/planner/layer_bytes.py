"""What the exchange of one MoE layer sends: from one rank to all others, out with rows, home with outputs.

    exact         rows that are wanted there, with K slots; an output for each pair of row and expert
    padded        frames of a fixed capacity, with K slots and a flag a row; whatever is in them
    pre-reduced   rows with K slots and K weights; an output for each row that came: what it costs the bits

The router is taken to choose evenly among ranks; only frames do not depend on it. The eight bytes that exact
splits send each rank beforehand are left out: what they cost is a wait.

Legend: K experts of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

from k2dist.parallel import Capacity
from k2dist.planner.work import SLOT_BYTES

WEIGHT_BYTES = 4  # float32


@dataclass(frozen=True, slots=True)
class LayerBytes:
    out: int
    home: int

    @property
    def total(self) -> int:
        return self.out + self.home


@dataclass(frozen=True, slots=True)
class EvenLayer:
    """`num_rows` of this rank to experts spread evenly over `num_ranks`.

    `row_bytes`: of a row on the wire without slots, `out_bytes`: of one expert's output.
    """

    num_rows: int
    num_ranks: int
    top_k: int
    row_bytes: int
    out_bytes: int

    def exact(self) -> LayerBytes:
        out = self._rows_away * (self.row_bytes + self.top_k * SLOT_BYTES)
        pairs_away = self.num_rows * self.top_k * (self.num_ranks - 1) / self.num_ranks
        return LayerBytes(round(out), round(pairs_away * self.out_bytes))

    def padded(self, capacity: Capacity) -> LayerBytes:
        """Exactly what `PaddedExchange` sends."""
        frame_out = capacity.rows * (self.row_bytes + (self.top_k + 1) * SLOT_BYTES)
        frame_home = capacity.pairs * self.out_bytes
        return LayerBytes((self.num_ranks - 1) * frame_out, (self.num_ranks - 1) * frame_home)

    def pre_reduced(self) -> LayerBytes:
        out = self._rows_away * (self.row_bytes + self.top_k * (SLOT_BYTES + WEIGHT_BYTES))
        return LayerBytes(round(out), round(self._rows_away * self.out_bytes))

    @property
    def _rows_away(self) -> float:
        """Rows times the other ranks that hold any of their experts."""
        is_hit = 1.0 - (1.0 - 1.0 / self.num_ranks) ** self.top_k
        return self.num_rows * (self.num_ranks - 1) * is_hit
