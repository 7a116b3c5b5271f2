"""What one rank of a lane works with during one step, besides its weights."""

from __future__ import annotations

from dataclasses import dataclass, field

from k2kernels import KernelSet
from torch import Tensor

from k2dist.comm import Communicator
from k2dist.config import Architecture
from k2dist.model.batch import Batch
from k2dist.model.latent_cache import LatentCache


@dataclass(frozen=True, slots=True)
class LaneStep:
    """`lane`: the group of the lane's tp ranks, `cache`: this rank's copy of the lane's latents.

    `cos_TF`, `sin_TF`: angles of all rows, looked up once and not in each layer.
    """

    batch: Batch
    cache: LatentCache
    lane: Communicator
    architecture: Architecture
    kernels: KernelSet
    cos_TF: Tensor = field(init=False)
    sin_TF: Tensor = field(init=False)

    def __post_init__(self) -> None:
        cos_TF, sin_TF = self.cache.rope.at(self.batch.position_T)
        object.__setattr__(self, "cos_TF", cos_TF)
        object.__setattr__(self, "sin_TF", sin_TF)

    def gather(self, x_tD: Tensor) -> Tensor:
        """All rows of the lane from every rank's own: [T, D]. Collective over the lane."""
        return self.lane.gather_rows(x_tD, self.batch.shares)

    def reduce(self, partial_TD: Tensor) -> Tensor:
        """This rank's rows of the sum of all ranks' float32 partial sums, in the stream's dtype: [t, D]."""
        return self.lane.reduce_rows(partial_TD, self.batch.shares, self.kernels.dtype)

    @property
    def first_row(self) -> int:
        """The lane's row that is row 0 of this rank's share."""
        return sum(self.batch.shares[: self.lane.rank])

    def own(self, x_TD: Tensor) -> Tensor:
        """This rank's rows of what all ranks hold: [t, D]."""
        return x_TD[self.first_row : self.first_row + self.batch.shares[self.lane.rank]]
