"""The supervisor as the coordinator sees it; `cluster.supervisor_handle` implements it over Ray."""

from __future__ import annotations

from typing import Protocol

from k2dist.cluster.status import ClusterStatus
from k2dist.observe import WorldState


class Supervision(Protocol):
    """Across a process border. K2Error: it is gone, or does not answer in time."""

    async def wait(self, revision: int) -> ClusterStatus:
        """The status once it is newer than `revision`, or as it is after some seconds."""
        ...

    async def look(self, timeout_s: float) -> WorldState:
        """What it knows of its ranks now."""
        ...
