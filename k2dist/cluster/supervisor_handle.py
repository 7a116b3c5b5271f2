"""The supervisor across a process border, as far as the coordinator needs it: a `service.Supervision`."""

from __future__ import annotations

from typing import Any

from k2dist.cluster.answers import answer
from k2dist.cluster.status import ClusterStatus
from k2dist.observe import WorldState

_POLL_S = 30.0  # how long `wait` waits for a change


class SupervisorHandle:
    """`actor` is the supervisor. Errors: PeerError, it died or does not answer in time."""

    def __init__(self, actor: Any, *, call_s: float) -> None:
        self._actor = actor
        self._call_s = call_s

    async def wait(self, revision: int) -> ClusterStatus:
        """The status once it is newer than `revision`, or as it is after some seconds."""
        call = self._actor.wait.remote(revision, _POLL_S)
        status: ClusterStatus = await answer(call, self._call_s + _POLL_S, "the supervisor")
        return status

    async def look(self, timeout_s: float) -> WorldState:
        """What it knows of its ranks now."""
        state: WorldState = await answer(self._actor.world_state.remote(), timeout_s, "the supervisor")
        return state
