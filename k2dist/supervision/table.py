"""The table of ranks: who is where in its life, in which generation, and how long that may last.

`advance` says how it changes.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass

from k2dist.config.cluster import DeadlinesConfig
from k2dist.ids import Generation, WorldRank

_NO_GENERATION = Generation(0)


class Phase(enum.IntEnum):
    """Of the world, in order; it never goes back."""

    NEW = 0
    PLACING = 1
    BUILDING = 2
    JOINING = 3
    RUNNING = 4
    DRAINING = 5
    STOPPING = 6
    REMOVING = 7
    STOPPED = 8


class RankState(enum.StrEnum):
    PLACED = "placed"  # has a place, no process
    STARTING = "starting"
    LOADING = "loading"
    READY = "ready"  # holds its weights
    JOINED = "joined"  # member of the generation
    STOPPED = "stopped"  # left its step loop as told; its process lives
    DEAD = "dead"


@dataclass(frozen=True, slots=True)
class RankRow:
    """One rank's place in the table. `since_s`: when it came into this state."""

    world_rank: WorldRank
    state: RankState = RankState.PLACED
    incarnation: int = 0  # 0: never started
    since_s: float = 0.0

    @property
    def has_process(self) -> bool:
        return self.state not in (RankState.PLACED, RankState.DEAD)


@dataclass(frozen=True, slots=True)
class Table:
    """See the module. `reason`: why the world ends, once it does; `is_failure`: not by request."""

    deadlines: DeadlinesConfig
    ranks: tuple[RankRow, ...]  # by world rank
    phase: Phase = Phase.NEW
    since_s: float = 0.0  # when the phase began
    generation: Generation = _NO_GENERATION
    lease_until_s: float | None = None  # None: nobody holds one
    reason: str = ""
    is_failure: bool = False

    def next_deadline(self) -> tuple[str, float] | None:
        """The earliest deadline's name and time: when to send a `Tick` if nothing happens before."""
        return min(_deadlines(self), key=lambda named: named[1], default=None)

    def check(self) -> None:
        """Assert what must hold between any two events."""
        states = {row.state for row in self.ranks}
        assert [row.world_rank for row in self.ranks] == list(range(len(self.ranks))), "ranks out of order"
        if self.phase <= Phase.PLACING:
            assert states == {RankState.PLACED}, "a process without a place"
        if self.phase in (Phase.JOINING, Phase.RUNNING, Phase.DRAINING):
            assert states <= {RankState.READY, RankState.JOINED}, f"{self.phase.name} with {sorted(states)}"
            assert self.generation >= 1, "joining no generation"
        if self.phase in (Phase.RUNNING, Phase.DRAINING):
            assert states == {RankState.JOINED}, f"{self.phase.name} with {sorted(states)}"
        if self.phase >= Phase.REMOVING:
            assert not any(row.has_process for row in self.ranks), "a process outlives its placement group"
        assert (self.phase >= Phase.DRAINING) == bool(self.reason), "an end without a reason, or the reverse"


def first_table(num_ranks: int, deadlines: DeadlinesConfig, *, has_lease: bool, now_s: float) -> Table:
    """A world of which nothing exists. `has_lease`: it ends when its driver's beats do."""
    return Table(
        deadlines=deadlines,
        ranks=tuple(RankRow(WorldRank(rank)) for rank in range(num_ranks)),
        since_s=now_s,
        lease_until_s=now_s + deadlines.lease_s if has_lease else None,
    )


def _deadlines(table: Table) -> Iterator[tuple[str, float]]:
    """Every deadline that runs now: its name in the config, and when it is over."""
    limits = table.deadlines
    by_phase = {
        Phase.PLACING: ("start_s", limits.start_s),
        Phase.JOINING: ("joined_s", limits.joined_s),
        Phase.DRAINING: ("drain_s", limits.drain_s),
        Phase.STOPPING: ("stop_s", limits.stop_s),
        Phase.REMOVING: ("stop_s", limits.stop_s),
    }
    if table.phase in by_phase:
        name, limit_s = by_phase[table.phase]
        yield name, table.since_s + limit_s
    if table.phase is Phase.BUILDING:
        for row in table.ranks:
            if row.state is RankState.STARTING:
                yield "start_s", row.since_s + limits.start_s
            elif row.state is RankState.LOADING:
                yield "load_s", row.since_s + limits.load_s
    if table.lease_until_s is not None and table.phase < Phase.DRAINING:
        yield "lease_s", table.lease_until_s
