"""What a rank's peers send to its experts: drawn once, from a popularity of experts that all of them share.

Each lane has as many rows as the rehearsed one, spread over its tp ranks; a rank without a lane has none. The
expert on place p of a layer's list, which is in another order in every layer, is wanted in proportion to
1 / p^skew. Skew 0: all alike; 1: with 384 experts the first is wanted by 15% of all choices.

Legend: R ranks, E experts, N rows of all peers, K experts of a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from k2dist.comm import PeerRows
from k2dist.engine.shares import even_shares
from k2dist.ids import SlotId, WorldRank
from k2dist.parallel import Layout, expert_homes

# Values drawn in all. Where rows are many, layers share draws: with 16 ranks of 4,096 rows after 10 of them.
_DRAWN_MAX = 2**28


def made_up_peers(
    layout: Layout,
    world_rank: int,
    *,
    num_experts: int,
    top_k: int,
    lane_rows: int,
    skew: float,
    seed: int,
    device: torch.device,
) -> list[PeerRows]:
    """Of each MoE layer of `layout`. For equal arguments the same; for another rank, of the same world."""
    shares = even_shares(lane_rows, layout.tp)
    rows_R = [0 if rank.tp_rank is None else shares[rank.tp_rank] for rank in layout.ranks]
    source_N = torch.arange(layout.world_size).repeat_interleave(torch.tensor(rows_R))
    num_layers = len(layout.place(world_rank).experts)
    num_draws = min(num_layers, max(1, _DRAWN_MAX // max(len(source_N) * num_experts, 1)))
    generator = torch.Generator().manual_seed(seed)
    draws = [_draw(len(source_N), num_experts, top_k, skew, generator) for _ in range(num_draws)]
    homes = _Homes(layout)
    peers = []
    for layer in range(num_layers):
        rank_RE, slot_RE = homes.of(layer)
        expert_NK = draws[layer % num_draws]
        is_here_NK = rank_RE[source_N[:, None], expert_NK] == world_rank
        slot_NK = torch.where(is_here_NK, slot_RE[source_N[:, None], expert_NK], -1)
        comes_N = is_here_NK.any(1) & (source_N != world_rank)  # its own rows are real
        counts = source_N[comes_N].bincount(minlength=layout.world_size).tolist()
        peers.append(PeerRows(tuple(counts), slot_NK[comes_N].to(torch.int32).contiguous().to(device)))
    return peers


def _draw(num_rows: int, num_experts: int, top_k: int, skew: float, generator: torch.Generator) -> Tensor:
    """Distinct experts for each row: int64 [N, K]. Drawing without replacement, by the largest of log share +
    Gumbel noise (Efraimidis and Spirakis 2006)."""
    place_E = torch.randperm(num_experts, generator=generator)
    share_E = -skew * (1.0 + place_E).log()
    noise_NE = torch.empty(num_rows, num_experts).exponential_(generator=generator).log_().neg_()
    return noise_NE.add_(share_E).topk(top_k, dim=1).indices


class _Homes:
    """Rank and slot to which each source sends each expert's rows; worked out once for layers alike."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._known: dict[tuple[tuple[int, ...], ...], tuple[Tensor, Tensor]] = {}

    def of(self, layer: int) -> tuple[Tensor, Tensor]:
        """Int64 [R, E] each."""
        table = tuple(rank.experts[layer] for rank in self._layout.ranks)
        if table not in self._known:
            sources = range(self._layout.world_size)
            rows = [expert_homes(self._layout, layer, WorldRank(source)) for source in sources]
            self._known[table] = _column(rows, 0), _column(rows, 1)
        return self._known[table]


def _column(rows: Sequence[Sequence[tuple[WorldRank, SlotId]]], index: int) -> Tensor:
    return torch.tensor([[home[index] for home in row] for row in rows], dtype=torch.int64)
