"""Whether a cluster is ready and well, from what it says of itself; if not, why and because of whom. Pure.

    ready    new requests are welcome: it serves, lanes are there, every rank has joined and tested itself
    well     steps advance where there is work, no collective stands still, every rank answers

Draining is no illness. What is unwell is not ready either. A lane that hangs in a collective answers every
question and computes nothing: its count of steps tells that, and what its ranks say of their waits, because
of whom (`late`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from k2dist.messages import LaneLoad
from k2dist.observe.late import Hang, find_hang
from k2dist.observe.state import ClusterState, Health, LaneView

_JOINED = "joined"


class HealthJudge:
    """Remembers how far lanes were; two looks `stall_s` apart see one that stands still."""

    def __init__(self, stall_s: float) -> None:
        self._stall_s = stall_s
        self._seen: dict[int, tuple[int, float]] = {}  # lane -> its steps, and since when it had work at them

    def judge(self, state: ClusterState, now_s: float) -> Health:
        hang = None if state.world is None else find_hang(state.world.ranks, self._stall_s)
        unwell = "; ".join(self._troubles(state.lanes, hang, now_s))
        reasons = [*_reasons(state), *([unwell] if unwell else [])]
        return Health(not_ready="; ".join(reasons), unwell=unwell, late=() if hang is None else hang.late)

    def _troubles(self, lanes: Sequence[LaneView], hang: Hang | None, now_s: float) -> Iterator[str]:
        if not lanes:
            yield "no lane is left"
        self._look([lane.load for lane in lanes if lane.load is not None], now_s)
        for lane, (_, since_s) in sorted(self._seen.items()):
            if now_s - since_s >= self._stall_s:
                yield f"lane {lane} has work and made no step for {now_s - since_s:.0f} s"
        if hang is not None:
            yield str(hang)

    def _look(self, loads: Sequence[LaneLoad], now_s: float) -> None:
        before, self._seen = self._seen, {}
        for load in loads:
            if load.num_running + load.num_waiting > 0:
                num_steps, since_s = before.get(load.lane, (-1, now_s))
                is_same = num_steps == load.num_steps
                self._seen[load.lane] = (load.num_steps, since_s if is_same else now_s)


def _reasons(state: ClusterState) -> Iterator[str]:
    if state.is_draining:
        yield "draining"
    ranks = () if state.world is None else state.world.ranks
    for rank_state in sorted({rank.state for rank in ranks} - {_JOINED}):
        numbers = ", ".join(str(rank.world_rank) for rank in ranks if rank.state == rank_state)
        yield f"{rank_state}: rank {numbers}"
