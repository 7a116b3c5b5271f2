"""Which members of a group reached a point: asked when something went wrong, never on the path of a step."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Sequence

from torch.distributed import DistError, Store  # type: ignore[attr-defined]  # not in the stubs

_LOOK_AGAIN_S = 0.02


class RollCall:
    """One member's view of a group's attendance, kept in a store. `members`: world ranks, in group order."""

    def __init__(self, store: Store, members: Sequence[int], rank: int) -> None:
        self._store = store
        self._members = tuple(members)
        self._rank = rank

    def report(self, point: str) -> None:
        """Note that this rank reached `point`. Does not wait; without a store nothing is noted."""
        # The store's host may be dead while every rank is well: that must not end a step.
        with contextlib.suppress(DistError):
            self._store.set(_key(point, self._rank), "here")

    def absent(self, point: str, wait_s: float) -> tuple[int, ...]:
        """World ranks not seen at `point` within `wait_s`; empty if all were, or the store is silent."""
        answer: queue.SimpleQueue[tuple[int, ...]] = queue.SimpleQueue()
        # In a thread of its own: a store whose host hangs never answers, and has no deadline.
        asking = threading.Thread(target=self._ask, args=(point, wait_s, answer), daemon=True)
        asking.start()
        try:
            return answer.get(timeout=wait_s + 2 * _LOOK_AGAIN_S)
        except queue.Empty:
            return ()

    def _ask(self, point: str, wait_s: float, answer: queue.SimpleQueue[tuple[int, ...]]) -> None:
        give_up_s = time.monotonic() + wait_s
        missing = set(range(len(self._members)))
        with contextlib.suppress(DistError):
            while True:
                missing = {rank for rank in missing if not self._store.check([_key(point, rank)])}
                if not missing or time.monotonic() >= give_up_s:
                    answer.put(tuple(self._members[rank] for rank in sorted(missing)))
                    return
                time.sleep(_LOOK_AGAIN_S)


def _key(point: str, rank: int) -> str:
    return f"seen/{point}/{rank}"
