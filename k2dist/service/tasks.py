"""Work that goes on by itself in an event loop, and is seen when it fails."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from k2dist.errors import K2Error
from k2dist.observe.event_log import EventLog

_log = EventLog(logging.getLogger(__name__))


class Tasks:
    """Those of one owner, from `spawn` to their end or `stop`."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        """How many run."""
        return len(self._running)

    def spawn(self, work: Coroutine[Any, Any, None], on_bug: Callable[[K2Error], None] | None = None) -> None:
        """Run `work` by itself. What escapes from it is a bug; `on_bug` tells those who wait for it."""
        task = asyncio.get_running_loop().create_task(work)
        self._running.add(task)
        task.add_done_callback(partial(self._note_done, on_bug))

    async def stop(self) -> None:
        """End all of it at once."""
        tasks = tuple(self._running)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _note_done(self, on_bug: Callable[[K2Error], None] | None, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        if task.cancelled() or (error := task.exception()) is None:
            return
        _log.bug("service.task_failed", error, task=str(task.get_coro()))
        if on_bug is not None:
            on_bug(K2Error(f"a bug in k2dist: {type(error).__name__}: {error}"))
