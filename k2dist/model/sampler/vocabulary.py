"""This rank's columns of the logits, and how ranks put together what each has found in its own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from k2dist.comm import Alone, Communicator


@dataclass(frozen=True, slots=True)
class VocabularySlice:
    """Columns [first, first + width) of `vocab_size`; the lane's ranks hold equal slices, in rank order."""

    lane: Communicator
    first: int
    width: int
    vocab_size: int

    @classmethod
    def of(cls, lane: Communicator, vocab_size: int) -> VocabularySlice:
        width, rest = divmod(vocab_size, lane.size)
        assert rest == 0, f"vocab_size {vocab_size} / {lane.size} is not whole"
        return cls(lane, lane.rank * width, width, vocab_size)

    @classmethod
    def whole(cls, vocab_size: int) -> VocabularySlice:
        return cls.of(Alone(), vocab_size)

    def ids(self, device: torch.device) -> Tensor:
        """Int64 [v]: the token ids of the columns."""
        return torch.arange(self.first, self.first + self.width, device=device)

    def gather(self, *found_N: Tensor) -> list[Tensor]:
        """Each tensor ([N] or [N, C], 8 bytes an element) of every rank: [r, N] or [r, N, C]. Collective.

        All of them travel in one exchange.
        """
        lane = self.lane
        sent_1B = torch.cat([x_N.contiguous().view(torch.int64).flatten() for x_N in found_N])[None]
        row_rB = lane.gather_rows(sent_1B, [1] * lane.size)
        parts_rB = row_rB.split([x_N.numel() for x_N in found_N], dim=1)
        return [
            part_rB.contiguous().view(x_N.dtype).view(lane.size, *x_N.shape)
            for part_rB, x_N in zip(parts_rB, found_N, strict=True)
        ]
