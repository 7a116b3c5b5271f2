"""Work that follows a step at once: the device thread does it when the step's tokens are read, before it
tells anybody of them.

    device thread   ... sample n, read ──> forward n + 1 ──> told: finish n
    otherwise       ... sample n, read ──> told: finish n ─╳─> forward n + 1

The step loop wakes with much to do, and Python's threads share one lock: the device would wait for whoever is
slower (without this 1.4 ms between a read and the next replay, with it 0.23: 64 rows, 2 cores under load).
Where launching is all that the work takes it goes first; on a CPU, where it is the step, it waits its turn.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Generic, TypeVar

T = TypeVar("T")
Work = Callable[[Sequence[int]], T]


class Follow(Generic[T]):
    """At most one piece of work behind one step. `offer` belongs to the step loop, all else to the device
    thread, which calls `run` or `close` once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._offered: tuple[Work[T], Future[T]] | None = None
        self._is_closed = False

    def offer(self, work: Work[T]) -> Future[T] | None:
        """What `work` gives, once it has been called with the step's tokens. None: too late."""
        with self._lock:
            if self._is_closed:
                return None
            assert self._offered is None, "one step follows another"
            self._offered = (work, Future())
            return self._offered[1]

    def run(self, token_ids: Sequence[int]) -> None:
        """Do what was offered. What it raises is its future's."""
        offered = self._close()
        if offered is None:
            return
        work, future = offered
        try:
            future.set_result(work(token_ids))
        except BaseException as error:  # noqa: BLE001  carried to whoever waits for it, and raised there
            future.set_exception(error)

    def close(self) -> None:
        """The step has failed: what was offered is dropped."""
        offered = self._close()
        if offered is not None:
            offered[1].cancel()

    def _close(self) -> tuple[Work[T], Future[T]] | None:
        with self._lock:
            self._is_closed = True
            return self._offered
