"""Which copy of an expert a rank uses: its own, else one of the others in turn."""

from itertools import product

from k2dist.config import Architecture
from k2dist.ids import WorldRank
from k2dist.parallel import expert_homes, first_layout


def test_a_home_holds_its_expert(small: Architecture) -> None:
    for slots in (None, 3, 5, 12):
        layout = first_layout(small, lanes=2, tp=2, slots_per_rank=slots)
        for layer, source in product(range(small.num_moe_layers), range(4)):
            homes = expert_homes(layout, layer, WorldRank(source))
            assert len(homes) == small.num_experts
            for expert, (rank, slot) in enumerate(homes):
                assert layout.ranks[rank].experts[layer][slot] == expert


def test_an_own_copy_comes_first(small: Architecture) -> None:
    layout = first_layout(small, lanes=4, tp=1, slots_per_rank=6)
    for source in range(4):
        homes = expert_homes(layout, 0, WorldRank(source))
        assert all(homes[expert][0] == source for expert in layout.ranks[source].experts[0])


def test_sources_share_the_copies(small: Architecture) -> None:
    """12 experts in 24 slots: of the 10 ranks that hold no copy of an expert, 5 go to each of its two."""
    layout = first_layout(small, lanes=12, tp=1, slots_per_rank=2)
    for expert in range(12):
        holders = [rank.world_rank for rank in layout.ranks if expert in rank.experts[0]]
        assert len(holders) == 2
        others = [rank for rank in range(12) if rank not in holders]
        used = [expert_homes(layout, 0, WorldRank(source))[expert][0] for source in others]
        assert sorted(used.count(holder) for holder in holders) == [5, 5]


def test_without_copies_all_sources_agree(small: Architecture) -> None:
    layout = first_layout(small, lanes=1, tp=2, expert_only_ranks=3)
    assert len({expert_homes(layout, 1, WorldRank(source)) for source in range(5)}) == 1
