"""The world across a process border: what its supervisor knows of its ranks, asked within a deadline.

What a `service.WorldWatch` is; the coordinator is handed one and never learns of Ray.
"""

from __future__ import annotations

from typing import Any

from k2dist.cluster.answers import answer
from k2dist.observe import WorldState


class WorldHandle:
    """`actor` is the supervisor."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    async def look(self, timeout_s: float) -> WorldState:
        """PeerError: the supervisor died, or does not answer within `timeout_s`."""
        state: WorldState = await answer(self._actor.world_state.remote(), timeout_s, "the supervisor")
        return state
