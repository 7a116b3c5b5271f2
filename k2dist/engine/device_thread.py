"""The thread of a rank that computes, while the step loop plans the next step.

Launches run one after another, in the order in which they were given, so a later one may use what an earlier
one has written. On a GPU their kernels are queued in the same order, on this thread's stream.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Self, TypeVar

import torch

T = TypeVar("T")


class DeviceThread:
    """See the module. A context: at its end the launch under way is waited for, the others are dropped."""

    def __init__(self, name: str) -> None:
        self.busy_s = 0.0  # so long have launches run in all
        self._name = name
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._is_closing = False
        self._thread: threading.Thread | None = None

    def launch(self, work: Callable[[], T]) -> Future[T]:
        """Run `work` behind all that was launched before; what it returns or raises is the future's."""
        future: Future[T] = Future()
        self._work.put(lambda: self._carry_out(work, future))
        return future

    def __enter__(self) -> Self:
        assert self._thread is None, "it is open"
        self._is_closing = False
        # A daemon: an interpreter that ends without having closed its world does not wait for it.
        self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._thread is not None, "it is not open"
        self._is_closing = True
        self._work.put(None)
        self._thread.join()
        self._thread = None

    def _run(self) -> None:
        with torch.inference_mode():
            while (work := self._work.get()) is not None:
                work()

    def _carry_out(self, work: Callable[[], Any], future: Future[Any]) -> None:
        if self._is_closing:
            future.cancel()
            return
        started_s = time.monotonic()
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001  carried to whoever waits for it, and raised there
            future.set_exception(error)
        self.busy_s += time.monotonic() - started_s
