"""One rank's paged cache of latents, and the angles of every position that it can hold.

Every tp rank of a lane keeps the whole of it: MLA has one latent for all heads. What a page holds before it
is written is never read.

C = num_pages * page_tokens places: token `offset` of page p is at p * page_tokens + offset. D = latent width
+ rotary width; over all layers 70,272 bytes a token for K2 in bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from k2kernels import KernelSet
from torch import Tensor

from k2dist.config import Architecture
from k2dist.model.yarn import RopeTable, rope_table


@dataclass(frozen=True, slots=True)
class LatentCache:
    """`layers[l]`: [C, D] of decoder layer l, written in place by `decoder.forward`.

    From place `first_spare` on are those that no page has, whole pages of them, for rows that are none.
    """

    layers: tuple[Tensor, ...]
    page_tokens: int
    rope: RopeTable
    first_spare: int

    @classmethod
    def allocate(
        cls,
        architecture: Architecture,
        num_pages: int,
        page_tokens: int,
        kernels: KernelSet,
        device: torch.device | None = None,
        num_spare: int = 0,
    ) -> LatentCache:
        """Memory is reserved, not touched: a page costs nothing before it is written.

        `num_spare`: places at least; they hold zeros, since somebody reads what nobody has written.
        """
        num_places = num_pages * page_tokens
        num_all = num_places + -(-num_spare // page_tokens) * page_tokens
        shape = (num_all, architecture.latent_dim)
        layers = tuple(
            torch.empty(shape, dtype=kernels.cache_dtype, device=device)
            for _ in range(architecture.num_layers)
        )
        for layer_CD in layers:
            layer_CD[num_places:] = 0.0
        table = rope_table(architecture, min(num_places, architecture.max_positions))
        rope = RopeTable(table.cos_PF.to(device), table.sin_PF.to(device))
        return cls(layers, page_tokens, rope, num_places)

    def spoil_spare(self) -> None:
        """NaN where rows that are none read and write: for twins that look for what gets out of there."""
        for layer_CD in self.layers:
            layer_CD[self.first_spare :] = torch.nan

    @property
    def num_bytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)
