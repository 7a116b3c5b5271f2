"""Which rank all others wait for: what turns a collective that hangs into a name. Pure.

Every rank counts the collectives that it has begun in each of its groups. In the group of whoever waits
longest, those that have begun fewer are late; and so is whoever does not answer at all: a process that was
stopped, or whose machine is gone, has nothing to say of itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from k2dist.messages import GroupStats
from k2dist.observe.state import RankView


class Hang(NamedTuple):
    """What stands still. `late` may be empty: all have arrived, and what carries their rows is to blame."""

    late: tuple[int, ...]  # world ranks
    waiting: tuple[int, ...]  # world ranks that wait for them
    where: str  # "all_to_all_rows (world)"; empty where nobody waits
    since_s: float

    def __str__(self) -> str:
        late = f"{_ranks(self.late)} {'is' if len(self.late) == 1 else 'are'} late" if self.late else ""
        if not self.waiting:
            return f"{late}: no answer for {self.since_s:.0f} s"
        waits = f"{_ranks(self.waiting)} waited {self.since_s:.0f} s in {self.where}"
        return f"{late}: {waits}" if late else f"{waits}, and nobody is late"


def find_hang(ranks: Sequence[RankView], bound_s: float) -> Hang | None:
    """The collective in which somebody has waited longest, if for `bound_s` or more; else a rank silent
    for so long, and who has waited for half of it: what waiters say is older than the silence.
    """
    gone = _gone(ranks)
    answering = [rank for rank in ranks if rank.world_rank not in gone]
    waits = [
        (group.waiting_s, rank, group) for rank in answering for group in _groups(rank) if group.under_way
    ]
    longest = max(waits, key=lambda wait: wait[0], default=None)
    silent = [rank for rank in ranks if rank.silent_s >= bound_s]
    if longest is not None and longest[0] >= (bound_s / 2 if silent else bound_s):
        waited_s, first, group = longest
        members = [rank for rank in ranks if _is_member(rank, group.group, first.lane)]
        late = tuple(rank.world_rank for rank in members if rank.world_rank in gone or _is_late(rank, group))
        waiting = tuple(rank.world_rank for rank in members if rank.world_rank not in late)
        return Hang(late, waiting, f"{group.under_way} ({group.group})", waited_s)
    if silent:
        return Hang(tuple(rank.world_rank for rank in silent), (), "", max(rank.silent_s for rank in silent))
    return None


def _gone(ranks: Sequence[RankView]) -> frozenset[int]:
    """Those that do not answer. One that is silent for less than half as long as another is slow to answer,
    as any process of a busy machine may be: what it said last still counts, and a hang is older."""
    longest_s = max((rank.silent_s for rank in ranks), default=0.0)
    return frozenset(rank.world_rank for rank in ranks if 0 < rank.silent_s >= longest_s / 2)


def _groups(rank: RankView) -> tuple[GroupStats, ...]:
    """What it said of its groups last."""
    return () if rank.stats is None else rank.stats.groups


def _is_member(rank: RankView, group: str, lane: int | None) -> bool:
    return rank.lane == lane if group.startswith("lane") else True


def _is_late(rank: RankView, waiter: GroupStats) -> bool:
    begun = [group.num_begun for group in _groups(rank) if group.group == waiter.group]
    return not begun or begun[0] < waiter.num_begun


def _ranks(world_ranks: Iterable[int]) -> str:
    numbers = [str(rank) for rank in world_ranks]
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(numbers)}"
