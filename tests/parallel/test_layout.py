"""A layout is judged by its table alone, and refused with the arithmetic."""

from collections.abc import Callable

import msgspec
import pytest

from k2dist.config import Architecture
from k2dist.errors import LayoutError
from k2dist.ids import ExpertId, LaneId, TpRank, WorldRank
from k2dist.parallel import Layout, RankPlace, check_layout, first_layout, legal_tp


def replaced(layout: Layout, rank: int, **changes: object) -> Layout:
    """The layout with one row of its table changed."""
    rows = list(layout.ranks)
    rows[rank] = msgspec.structs.replace(rows[rank], **changes)
    return msgspec.structs.replace(layout, ranks=tuple(rows))


def with_experts(layout: Layout, rank: int, *per_layer: tuple[int, ...]) -> Layout:
    return replaced(layout, rank, experts=tuple(tuple(map(ExpertId, row)) for row in per_layer))


def test_twelve_experts_on_four_ranks_are_three_each(small: Architecture) -> None:
    layout = first_layout(small, lanes=2, tp=2)
    assert [rank.experts[0] for rank in layout.ranks] == [(0, 1, 2), (3, 4, 5), (6, 7, 8), (9, 10, 11)]
    assert [(rank.lane, rank.tp_rank) for rank in layout.ranks] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert (layout.world_size, layout.num_lanes, layout.members(1)) == (4, 2, (2, 3))
    assert all(rank.experts[0] == rank.experts[1] and len(rank.experts) == 2 for rank in layout.ranks)


def test_uneven_ranks_differ_by_one_slot(small: Architecture) -> None:
    layout = first_layout(small, lanes=2, tp=2, expert_only_ranks=1)
    assert [len(rank.experts[0]) for rank in layout.ranks] == [3, 3, 2, 2, 2]
    assert layout.place(4).lane is None
    assert layout.num_lanes == 2


def test_second_copies_lie_on_other_ranks(small: Architecture) -> None:
    layout = first_layout(small, lanes=4, tp=1, slots_per_rank=5)
    assert all(len(set(rank.experts[0])) == 5 for rank in layout.ranks)
    copies = [sum(expert in rank.experts[0] for rank in layout.ranks) for expert in range(12)]
    assert copies == [2] * 8 + [1] * 4


def test_tp_up_to_16_is_legal_for_k2(k2: Architecture) -> None:
    assert legal_tp(k2) == (1, 2, 4, 8, 16)
    first_layout(k2, lanes=1, tp=16)
    first_layout(k2, lanes=16, tp=1)


def test_an_unquantised_model_has_no_scale_block_to_cut(k2: Architecture) -> None:
    assert legal_tp(msgspec.structs.replace(k2, scale_block=None)) == (1, 2, 4, 8, 16, 32, 64)


def test_a_ragged_width_is_legal_where_nothing_cuts_it(small: Architecture) -> None:
    assert legal_tp(msgspec.structs.replace(small, num_heads=3)) == (1,)


@pytest.mark.parametrize(
    ("lanes", "tp", "expert_only_ranks", "message"),
    [
        (1, 32, 0, "intermediate_size: 18432 / 32 = 576 cuts a 128-block.*; use tp=16$"),
        (1, 3, 0, "num_attention_heads 64 / 3 is not whole; use tp=2 or 4$"),
        (24, 16, 1, "385 ranks for 384 experts: .* use 384 ranks or fewer"),
        (0, 1, 0, "lanes=0: must be at least 1"),
        (1, 0, 0, "tp=0: must be at least 1"),
        (1, 1, -1, "expert_only_ranks=-1: must be at least 0"),
    ],
)
def test_k2_layouts_are_refused_with_the_arithmetic(
    k2: Architecture, lanes: int, tp: int, expert_only_ranks: int, message: str
) -> None:
    with pytest.raises(LayoutError, match=message):
        first_layout(k2, lanes=lanes, tp=tp, expert_only_ranks=expert_only_ranks)


@pytest.mark.parametrize("slots", [2, 13])
def test_slots_must_hold_all_experts_and_none_twice(small: Architecture, slots: int) -> None:
    with pytest.raises(LayoutError, match=f"slots_per_rank={slots}: .* use 3 to 12"):
        first_layout(small, lanes=4, tp=1, slots_per_rank=slots)


BROKEN: dict[str, tuple[Callable[[Layout], Layout], str]] = {
    "expert nowhere": (
        lambda layout: with_experts(layout, 0, (0, 1, 2), (0, 1)),
        "moe layer 1: expert 2 on no rank",
    ),
    "expert twice on a rank": (
        lambda layout: with_experts(layout, 3, (9, 10, 11, 9), (9, 10, 11)),
        "rank 3, moe layer 0: expert 9 twice on one rank",
    ),
    "unknown expert": (
        lambda layout: with_experts(layout, 3, (9, 10, 11), (9, 10, 11, 12)),
        "rank 3, moe layer 1: expert 12 not in 0 .. 11",
    ),
    "too few layers": (
        lambda layout: with_experts(layout, 2, (6, 7, 8)),
        "rank 2 lists experts for 1 moe layers, the model has 2",
    ),
    "world ranks out of order": (
        lambda layout: replaced(layout, 1, world_rank=WorldRank(5)),
        r"ranks\[1\]\.world_rank=5: rows must be in order",
    ),
    "tp rank twice": (
        lambda layout: replaced(layout, 1, tp_rank=TpRank(0)),
        r"lane 0 has tp ranks \[0, 0\]: tp=2",
    ),
    "lane left out": (
        lambda layout: replaced(layout, 2, lane=LaneId(2)),
        r"lane 1 has tp ranks \[1\]",
    ),
    "tp rank without lane": (
        lambda layout: replaced(layout, 3, lane=None),
        "rank 3: lane=None and tp_rank=1: give both or neither",
    ),
    "gap in lanes": (
        lambda layout: replaced(replaced(layout, 2, lane=LaneId(7)), 3, lane=LaneId(7)),
        r"lanes \[0, 7\]: .* numbered from 0",
    ),
    "rank with nothing to do": (
        lambda layout: Layout(
            tp=2,
            ranks=(
                *layout.ranks,
                RankPlace(world_rank=WorldRank(4), lane=None, tp_rank=None, experts=((), ())),
            ),
        ),
        "rank 4 has neither a lane nor an expert",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_table_is_refused_by_what_is_wrong(small: Architecture, name: str) -> None:
    breaks, message = BROKEN[name]
    with pytest.raises(LayoutError, match=message):
        check_layout(small, breaks(first_layout(small, lanes=2, tp=2)))


def test_all_faults_of_a_table_come_at_once(small: Architecture) -> None:
    layout = with_experts(
        replaced(first_layout(small, lanes=2, tp=2), 1, tp_rank=TpRank(0)), 0, (0, 1), (0, 1)
    )
    with pytest.raises(LayoutError) as caught:
        check_layout(small, msgspec.structs.replace(layout, tp=3))
    text = str(caught.value)
    assert "tp=3" in text
    assert "lane 0" in text
    assert "expert 2 on no rank" in text


def test_a_layout_crosses_processes_unchanged(small: Architecture) -> None:
    layout = first_layout(small, lanes=2, tp=2, expert_only_ranks=1)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(layout), type=Layout) == layout
