"""Made-up peers: one world, whichever of its ranks looks, with the load that was asked for."""

from __future__ import annotations

import torch

from k2dist.comm import PeerRows
from k2dist.config import Architecture
from k2dist.parallel import Layout, expert_homes, first_layout
from k2dist.rehearsal.peers import made_up_peers

CPU = torch.device("cpu")


def peers_of(
    architecture: Architecture, layout: Layout, rank: int, lane_rows: int, skew: float = 0.0
) -> list[PeerRows]:
    return made_up_peers(
        layout,
        rank,
        num_experts=architecture.num_experts,
        top_k=architecture.top_k,
        lane_rows=lane_rows,
        skew=skew,
        seed=5,
        device=CPU,
    )


def test_rows_come_from_ranks_of_lanes_and_from_others_only(tiny: Architecture) -> None:
    layout = first_layout(tiny, lanes=2, tp=2, expert_only_ranks=1)
    for rank in range(layout.world_size):
        for layer in peers_of(tiny, layout, rank, lane_rows=5):
            most = [3, 2, 3, 2, 0]  # 5 rows over tp 2
            most[rank] = 0
            assert all(count <= limit for count, limit in zip(layer.counts, most, strict=True))
            assert layer.slot_NK.shape == (sum(layer.counts), tiny.top_k)
            assert (layer.slot_NK >= 0).any(1).all(), "a row comes for at least one slot"
            assert (layer.slot_NK < len(layout.place(rank).experts[0])).all()


def test_all_ranks_together_receive_every_choice_once(tiny: Architecture) -> None:
    """What a rank keeps for itself is real, and in nobody's draw: sources are counted at all others."""
    layout = first_layout(tiny, lanes=4, tp=1)
    found = [peers_of(tiny, layout, rank, lane_rows=50) for rank in range(4)]
    for layer in range(tiny.num_moe_layers):
        pairs = sum(int((ranks[layer].slot_NK >= 0).sum()) for ranks in found)
        chosen = 4 * 50 * tiny.top_k
        assert 0.65 * chosen < pairs < 0.85 * chosen, "three quarters go elsewhere"


def test_an_even_load_is_even_and_a_skewed_one_is_not(tiny: Architecture) -> None:
    layout = first_layout(tiny, lanes=1, tp=1, expert_only_ranks=1)
    slots = len(layout.place(1).experts[0])
    even = peers_of(tiny, layout, 1, lane_rows=4000)[0].slot_NK
    counts = even[even >= 0].bincount(minlength=slots) / 4000
    assert torch.allclose(counts, torch.full((slots,), tiny.top_k / tiny.num_experts), atol=0.03)
    skewed = peers_of(tiny, layout, 1, lane_rows=4000, skew=2.0)[0].slot_NK
    counts = skewed[skewed >= 0].bincount(minlength=slots) / 4000
    assert counts.max() > 4 * counts.min()


def test_rows_of_a_second_copy_go_where_the_layout_sends_them(tiny: Architecture) -> None:
    layout = first_layout(tiny, lanes=3, tp=1, slots_per_rank=8)  # 24 slots for 12 experts
    for rank in range(3):
        layer = peers_of(tiny, layout, rank, lane_rows=200)[0]
        source_N = torch.arange(3).repeat_interleave(torch.tensor(layer.counts))
        for source in range(3):
            homes = expert_homes(layout, 0, layout.place(source).world_rank)
            used = {slot for home, slot in homes if home == rank}
            seen = layer.slot_NK[source_N == source]
            assert set(seen[seen >= 0].tolist()) <= used
