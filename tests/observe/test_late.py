"""Who is late is told by the numbers of collectives begun, and by silence."""

from __future__ import annotations

from k2dist.messages import GroupStats, RankStats
from k2dist.observe import RankView, find_hang


def rank(world_rank: int, *groups: GroupStats, lane: int | None = 0, silent_s: float = 0.0) -> RankView:
    stats = RankStats(
        world_rank=world_rank,
        num_steps=1,
        num_tokens_sampled=0,
        step_s_total=0.0,
        host_s_total=0.0,
        device_s_total=0.0,
        num_rows_sent=0,
        num_bytes_sent=0,
        num_steps_padded=0,
        num_overflows=0,
        num_masks=0,
        masks_s_total=0.0,
        num_masks_late=0,
        expert_load=((3, 5), (0, 0)),
        groups=groups,
    )
    view = RankView(world_rank=world_rank, lane=lane, tp_rank=0, state="joined", silent_s=silent_s)
    return view.told(stats)


def group(name: str, num_begun: int, waiting_s: float | None = None) -> GroupStats:
    under_way = "" if waiting_s is None else "reduce_rows"
    return GroupStats(group=name, num_begun=num_begun, under_way=under_way, waiting_s=waiting_s or 0.0)


def test_whoever_has_begun_fewer_is_late() -> None:
    ranks = [
        rank(0, group("world", 8, 6.0), group("world-control", 3)),
        rank(1, group("world", 7)),
        rank(2, group("world", 8, 5.9)),
    ]
    hang = find_hang(ranks, 5.0)
    assert hang is not None
    assert (hang.late, hang.waiting, hang.since_s) == ((1,), (0, 2), 6.0)
    assert str(hang) == "rank 1 is late: ranks 0, 2 waited 6 s in reduce_rows (world)"
    assert find_hang(ranks, 6.5) is None


def test_in_a_lanes_group_only_its_ranks_can_be_late() -> None:
    ranks = [
        rank(0, group("lane", 9, 7.0)),
        rank(1, group("lane", 8)),
        rank(2, group("lane", 2), lane=1),
        rank(3, lane=None),
    ]
    hang = find_hang(ranks, 5.0)
    assert hang is not None
    assert (hang.late, hang.waiting) == ((1,), (0,))


def test_a_silent_rank_is_late_whatever_it_said_last() -> None:
    ranks = [rank(0, group("world", 8, 6.0)), rank(1, group("world", 8, 9.0), silent_s=1.0)]
    hang = find_hang(ranks, 5.0)
    assert hang is not None
    assert (hang.late, hang.waiting) == ((1,), (0,))


def test_who_is_only_slow_to_answer_is_not_late() -> None:
    """A stopped rank, and two of a busy machine that have not answered this once."""
    ranks = [
        rank(0, group("world", 8, 5.5), silent_s=1.0),
        rank(1, group("world", 8, 5.5), silent_s=0.8),
        rank(2, group("world", 8, 6.0)),
        rank(3, group("world", 7), silent_s=5.0),
    ]
    hang = find_hang(ranks, 5.0)
    assert hang is not None
    assert (hang.late, hang.waiting) == ((3,), (0, 1, 2))


def test_a_rank_that_nobody_waits_for_is_missed_all_the_same() -> None:
    ranks = [rank(0, group("world", 8)), rank(1, silent_s=30.0)]
    hang = find_hang(ranks, 5.0)
    assert hang is not None
    assert str(hang) == "rank 1 is late: no answer for 30 s"


def test_silence_that_is_long_enough_needs_waits_only_half_as_long() -> None:
    """What the others said of their waits is older than the silence."""
    ranks = [rank(0, group("world", 8, 4.0)), rank(1, group("world", 7)), rank(2, silent_s=5.0)]
    hang = find_hang(ranks, 5.0)
    assert hang is not None
    assert (hang.late, hang.waiting, hang.since_s) == ((1, 2), (0,), 4.0)
    assert find_hang(ranks[:2], 5.0) is None


def test_when_all_have_arrived_nobody_is_blamed() -> None:
    hang = find_hang([rank(0, group("world", 8, 6.0)), rank(1, group("world", 8, 6.0))], 5.0)
    assert hang is not None
    assert str(hang) == "ranks 0, 1 waited 6 s in reduce_rows (world), and nobody is late"


def test_a_view_sums_the_load_of_experts_up() -> None:
    view = rank(0)
    assert view.stats is not None
    assert view.stats.expert_load == ()
    assert [(layer.num_rows, layer.num_rows_peak, layer.num_slots) for layer in view.layers] == [
        (8, 5, 2),
        (0, 0, 2),
    ]
