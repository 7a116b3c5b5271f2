"""The coordinator's queue: what has not been accepted yet, and who is next.

    higher priority first; within a priority the tenants take turns; within a tenant first come, first served

A request that waits here has been promised nothing: it is accepted once a lane has admitted it. A tenant that
sends a thousand requests waits behind itself, not before others; but all share the bound `max_queued`.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from k2dist.errors import CapacityError, ConfigError, RequestError
from k2dist.ids import RequestId
from k2dist.messages import Request


@dataclass(frozen=True, slots=True)
class Admitted:
    """One decision: `ready` go to lanes now, in this order; `expired` waited past their deadline."""

    ready: tuple[Request, ...] = ()
    expired: tuple[Request, ...] = ()


@dataclass(frozen=True, slots=True)
class _Waiting:
    request: Request
    deadline_s: float


@dataclass(slots=True)
class _Class:
    """Requests of one priority: a queue per tenant that has any, and whose turn it is."""

    queues: dict[str, deque[_Waiting]] = field(default_factory=dict)
    turns: deque[str] = field(default_factory=deque)


class Admission:
    """A bounded queue with turns. A request's `deadline_s` is a time on the clock of `now_s`."""

    def __init__(self, max_queued: int) -> None:
        if max_queued < 1:
            raise ConfigError(f"service.max_queued={max_queued}: must be at least 1")
        self._max_queued = max_queued
        self._classes: dict[int, _Class] = {}
        self._ids: dict[RequestId, _Waiting] = {}

    def __len__(self) -> int:
        return len(self._ids)

    def offer(self, request: Request, now_s: float, *, deadline_s: float) -> None:
        """Let it wait until `deadline_s`. `CapacityError`: the queue is full; `RequestError`: a used id."""
        if request.request_id in self._ids:
            raise RequestError("request_id", f"{request.request_id!r} is in use; take another")
        if len(self._ids) >= self._max_queued:
            raise CapacityError(f"service.max_queued={self._max_queued} requests wait; try again later")
        waiting = _Waiting(request, deadline_s)
        line = self._classes.setdefault(request.priority, _Class())
        if request.tenant not in line.queues:
            line.queues[request.tenant] = deque()
            line.turns.append(request.tenant)
        line.queues[request.tenant].append(waiting)
        self._ids[request.request_id] = waiting

    def withdraw(self, request_id: RequestId) -> bool:
        """Forget a request whose client went away; false if it does not wait here (any more)."""
        waiting = self._ids.get(request_id)
        if waiting is not None:
            self._remove(waiting)
        return waiting is not None

    def take(self, room: int, now_s: float) -> Admitted:
        """The next requests, `room` of them at most, and all whose deadline has come."""
        expired = [waiting for waiting in self._ids.values() if waiting.deadline_s <= now_s]
        for waiting in expired:
            self._remove(waiting)
        ready = [self._pop() for _ in range(min(room, len(self._ids)))]
        return Admitted(tuple(ready), tuple(waiting.request for waiting in expired))

    def next_deadline_s(self) -> float | None:
        """When `take` next has something to expire, if nothing else happens."""
        return min((waiting.deadline_s for waiting in self._ids.values()), default=None)

    def _pop(self) -> Request:
        """The first request of the tenant whose turn it is, in the highest priority; the turn moves on."""
        line = self._classes[max(self._classes)]
        waiting = line.queues[line.turns[0]][0]
        line.turns.rotate(-1)
        self._remove(waiting)
        return waiting.request

    def _remove(self, waiting: _Waiting) -> None:
        request = waiting.request
        line = self._classes[request.priority]
        line.queues[request.tenant].remove(waiting)
        if not line.queues[request.tenant]:
            del line.queues[request.tenant]
            line.turns.remove(request.tenant)
        if not line.queues:
            del self._classes[request.priority]
        del self._ids[request.request_id]

    def check(self) -> None:
        """Assert what must hold between any two calls."""
        assert len(self._ids) <= self._max_queued, f"{len(self._ids)} wait"
        queued = [w for line in self._classes.values() for queue in line.queues.values() for w in queue]
        assert {w.request.request_id for w in queued} == set(self._ids), "a request is lost"
        assert len(queued) == len(self._ids), "a request waits twice"
        for line in self._classes.values():
            assert line.queues, "an empty priority"
            assert all(line.queues.values()), "a tenant without requests has a turn"
            assert sorted(line.turns) == sorted(line.queues), "a tenant has no turn, or two"
