"""Which requests run out of time, and when."""

from __future__ import annotations

from bisect import bisect_left, insort

from k2dist.ids import RequestId


class Deadlines:
    """Requests by their deadlines, on the clock of `now_s`. Asking costs nothing while none is due."""

    def __init__(self) -> None:
        self._queue: list[tuple[float, RequestId]] = []  # the next one first
        self._of: dict[RequestId, float] = {}

    def __len__(self) -> int:
        return len(self._queue)

    def start(self, request_id: RequestId, deadline_s: float) -> None:
        """A request has one deadline; it must not have one already."""
        assert request_id not in self._of, f"{request_id} has a deadline"
        self._of[request_id] = deadline_s
        insort(self._queue, (deadline_s, request_id))

    def discard(self, request_id: RequestId) -> None:
        """The request has ended; if it has no deadline, nothing happens."""
        deadline_s = self._of.pop(request_id, None)
        if deadline_s is not None:
            del self._queue[bisect_left(self._queue, (deadline_s, request_id))]

    def due(self, now_s: float) -> list[RequestId]:
        """Requests whose deadline is not after `now_s`, the earliest first. They stay until discarded."""
        if not self._queue or self._queue[0][0] > now_s:
            return []
        return [request_id for deadline_s, request_id in self._queue if deadline_s <= now_s]

    def check(self, live: set[RequestId]) -> None:
        """Assert that exactly requests of `live` are here, each once, in order."""
        assert self._queue == sorted((s, request_id) for request_id, s in self._of.items()), "out of order"
        assert set(self._of) <= live, "a request that has ended has a deadline"
