"""Keeps grpc.health true: SERVING while the cluster is ready, looked at while there is work.

An idle cluster is asked nothing: its ranks sleep, and what could stand still does not run.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from k2dist.observe.event_log import EventLog
from k2dist.service.state import StateWatch
from k2dist.service.tasks import Tasks

_LOOK_S = 1.0
_log = EventLog(logging.getLogger(__name__))


class HealthKeeper:
    """`tell` is told whenever it changes whether requests are welcome. Belongs to one event loop."""

    def __init__(
        self, watch: StateWatch, has_work: Callable[[], bool], tell: Callable[[bool], Awaitable[None]]
    ) -> None:
        self._watch = watch
        self._has_work = has_work
        self._tell = tell
        self._is_ready = True
        self._tasks = Tasks()

    def start(self) -> None:
        self._tasks.spawn(self._keep())

    async def stop(self) -> None:
        await self._tasks.stop()

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_S)
            if self._has_work() or not self._is_ready:
                health = (await self._watch.look()).health
                if self._is_ready != (not health.not_ready):
                    self._is_ready = not self._is_ready
                    _log.warning(
                        "health.changed",
                        is_ready=self._is_ready,
                        reason=health.not_ready,
                        late_ranks=list(health.late),
                    )
                    await self._tell(self._is_ready)
