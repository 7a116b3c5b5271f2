"""The cluster's changes for whoever watches: the coordinator's own view and the supervisor's, as one history.

supervisor ──status, at each change──┐
coordinator ──lanes lost, draining───┴──> ClusterFeed ──> WatchCluster, GetTopology
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

from k2dist.coordinator import ClusterFeed, Member, Membership
from k2dist.errors import K2Error
from k2dist.service.coordinator import Coordinator
from k2dist.service.supervision import Supervision
from k2dist.service.tasks import Tasks

_AGAIN_S = 5.0  # after a supervisor that did not answer
_log = logging.getLogger(__name__)


class ClusterWatch:
    """One coordinator's. Every method belongs to its event loop."""

    def __init__(self, coordinator: Coordinator[Any], *, first_revision: int) -> None:
        self._coordinator = coordinator
        self.feed = ClusterFeed(Membership(lanes=tuple(coordinator.lanes)), first_revision=first_revision)
        self._changed = asyncio.Event()
        self._tasks = Tasks()
        coordinator.on_change = self._note_lanes

    def follow(self, supervision: Supervision) -> None:
        """Take in what the supervisor says, until `stop`."""
        self._tasks.spawn(self._follow(supervision))

    async def stop(self) -> None:
        await self._tasks.stop()

    async def changes(self, revision: int, every_s: float) -> AsyncGenerator[tuple[int, Membership | None]]:
        """Each change from `revision` on; where there is none for `every_s`, the last revision and None.

        CompactedError: they are not kept, or this reader was so slow that they are no longer.
        """
        while True:
            changed = self._changed  # before looking: what comes now sets it
            entries = self.feed.since(revision)
            for entry in entries:
                yield entry
            revision = entries[-1][0] + 1 if entries else revision
            if entries:
                continue  # more may have come while these were read
            try:
                async with asyncio.timeout(every_s):
                    await changed.wait()
            except TimeoutError:
                yield revision - 1, None

    async def _follow(self, supervision: Supervision) -> None:
        revision = -1
        while True:
            try:
                status = await supervision.wait(revision)
            except K2Error as error:
                _log.warning("cluster_watch.no_supervisor error=%s", error)
                await asyncio.sleep(_AGAIN_S)
                continue
            revision = status.revision
            ranks = tuple(Member(rank.world_rank, rank.state, rank.node) for rank in status.ranks)
            self._note(replace(self.feed.state, generation=status.generation, ranks=ranks))

    def _note_lanes(self) -> None:
        coordinator = self._coordinator
        self._note(
            replace(self.feed.state, lanes=tuple(coordinator.lanes), is_draining=coordinator.is_draining)
        )

    def _note(self, state: Membership) -> None:
        if self.feed.note(state):
            self._changed.set()
            self._changed = asyncio.Event()
