"""Where a rank sleeps while every lane is idle.

All ranks fall asleep together: an agreement said "all idle", and it was number `epoch` of its kind. The first
rank with work rings every doorbell with that epoch; each rank then wakes and joins the next agreement. A ring
that comes late, or twice, is for an epoch that has passed and wakes nobody.
"""

from __future__ import annotations

import threading
from collections.abc import Callable


class Doorbell:
    """One rank's bell. `ring` and `nudge` may be called from any thread; `wait` by the step loop alone."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._rung_epoch = -1
        self._num_nudges = 0

    def ring(self, epoch: int) -> None:
        """Somebody has work: end the sleep numbered `epoch`."""
        with self._changed:
            self._rung_epoch = max(self._rung_epoch, epoch)
            self._changed.notify_all()

    def nudge(self) -> None:
        """Look again whether this rank itself has a reason to wake."""
        with self._changed:
            self._num_nudges += 1
            self._changed.notify_all()

    def wait(self, epoch: int, has_reason: Callable[[], bool]) -> bool:
        """Sleep until rung for `epoch`, or until `has_reason()`; true if this rank must ring the others.

        There is no deadline: a rank that dies in its sleep is noticed by whoever hosts it. `has_reason` is
        called without the bell's lock, and a nudge that falls before the wait is not lost.
        """
        while True:
            with self._changed:
                seen = self._num_nudges
            if has_reason():
                return True
            with self._changed:
                while self._rung_epoch < epoch and self._num_nudges == seen:
                    self._changed.wait()
                if self._rung_epoch >= epoch:
                    return False
