"""Whether a cluster is ready and well, from what it says of itself; if not, why and because of whom. Pure.

    ready    new requests are welcome: it serves, lanes are there, every rank has joined and tested itself
    well     steps advance where there is work, no collective stands still, every rank answers

Draining is no illness. What is unwell is not ready either.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from k2dist.observe.late import Hang, find_hang
from k2dist.observe.progress import LaneWork, Progress
from k2dist.observe.state import ClusterState, Health, LaneView, WorldState

_JOINED = "joined"


class HealthJudge:
    """Remembers how far lanes were; two looks `stall_s` apart see one that stands still."""

    def __init__(self, stall_s: float) -> None:
        self._stall_s = stall_s
        self._progress = Progress(stall_s)

    def judge(self, state: ClusterState, now_s: float) -> Health:
        world = state.world
        hang = None if world is None else find_hang(world.ranks, self._stall_s)
        unwell = "; ".join(self._troubles(state.lanes, hang, now_s))
        reasons = [*_reasons(state, world), *([unwell] if unwell else [])]
        return Health(
            not_ready="; ".join(dict.fromkeys(reasons)), unwell=unwell, late=() if hang is None else hang.late
        )

    def _troubles(self, lanes: Sequence[LaneView], hang: Hang | None, now_s: float) -> Iterator[str]:
        if not lanes:
            yield "no lane is left"
        loads = [lane.load for lane in lanes if lane.load is not None]
        works = [
            LaneWork(load.lane, load.num_steps, load.num_running + load.num_waiting > 0) for load in loads
        ]
        for lane, since_s in self._progress.look(works, now_s):
            yield f"lane {lane} has work and made no step for {since_s:.0f} s"
        if hang is not None:
            yield str(hang)


def _reasons(state: ClusterState, world: WorldState | None) -> Iterator[str]:
    if state.is_draining:
        yield "draining"
    if not state.lanes:
        yield "no lane is left"
    if world is not None:
        others = {rank.state for rank in world.ranks} - {_JOINED}
        for rank_state in sorted(others):
            numbers = ", ".join(str(rank.world_rank) for rank in world.ranks if rank.state == rank_state)
            yield f"{rank_state}: rank {numbers}"
