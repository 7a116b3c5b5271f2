"""A lane as others reach it: requests in, numbered events out, from any thread.

`LanePort` joins the pure scheduler to the world. The step loop calls `plan` and `commit`; a coordinator calls
`admit`, `cancel`, `events` and `live`. One lock guards the scheduler: its calls take milliseconds, so an
admission never waits for a forward pass.

    coordinator ── admit, cancel ──> scheduler ── plan ──> step loop
         ^                                                    │
         └───────── events(after) <── outbox <── commit ──────┘
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping

from msgspec.structs import replace

from k2dist.errors import CapacityError, RequestError, UnavailableError
from k2dist.ids import Generation, LaneId, RequestId
from k2dist.messages import (
    AdmitReply,
    Constraint,
    Event,
    EventBatch,
    FinishReason,
    LaneLoad,
    LiveOutput,
    LiveRequest,
    Request,
    StepPlan,
    StepResult,
)
from k2dist.scheduler import Scheduler, check_request


class _Kept:
    """One request and all it has produced, until `retain_s` after its end."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.tokens = [list(request.generated.get(i, ())) for i in range(request.num_outputs)]
        self.finish: list[FinishReason | None] = [None] * request.num_outputs
        self.ended_s: float | None = None

    def append(self, event: Event, now_s: float) -> None:
        tokens = self.tokens[event.output_index]
        assert event.first_index == len(tokens), "the scheduler emitted a gap"
        tokens.extend(event.token_ids)
        if event.finish is not None:
            self.finish[event.output_index] = event.finish
            if all(reason is not None for reason in self.finish):
                self.ended_s = now_s

    def facts(self) -> LiveRequest:
        outputs = zip(self.tokens, self.finish, strict=True)
        return LiveRequest(
            request=self.request,
            outputs=tuple(LiveOutput(token_ids=tuple(ids), finish=finish) for ids, finish in outputs),
        )


class LanePort:
    """One lane's inbox and outbox round its scheduler. Every method may be called from any thread.

    `wake` is called, without the lock, whenever there is new work for a sleeping step loop. Prompts may hold
    the ids 0 to vocab_size - 1. `check_constraint` raises RequestError for one that cannot be enforced; it
    may take a second, and is called without the lock, in the thread that admits.
    """

    def __init__(
        self,
        lane: LaneId,
        scheduler: Scheduler,
        *,
        vocab_size: int,
        retain_s: float,
        check_constraint: Callable[[Constraint], object],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.lane = lane
        self.wake: Callable[[], None] = lambda: None
        self._scheduler = scheduler
        self._vocab_size = vocab_size
        self._retain_s = retain_s
        self._check_constraint = check_constraint
        self._clock = clock
        self._lock = threading.Lock()
        self._grown = threading.Condition(self._lock)
        self._outbox: deque[Event] = deque()
        self._first = 0  # number of the outbox's first event
        self._kept: dict[RequestId, _Kept] = {}
        self._closed = ""  # why no more requests are taken; empty while open
        self.has_failed = False  # a rank of the lane has left its loop; else an error is of its request alone

    # -- the coordinator's side ------------------------------------------------------------------------

    def admit(self, requests: tuple[Request, ...]) -> tuple[AdmitReply, ...]:
        """Take each request or say why not. The same one again is the same one: nothing is doubled."""
        replies = tuple(self._reply(request) for request in requests)
        self.wake()
        return replies

    def cancel(self, ids: tuple[RequestId, ...]) -> None:
        """End these requests before the next step is planned; unknown or ended ones are left alone."""
        with self._lock:
            for request_id in ids:
                kept = self._kept.get(request_id)
                if kept is not None and kept.ended_s is None:
                    self._publish(self._scheduler.abort(request_id))
        self.wake()  # the pages go back with the next plan

    def events(self, after: int, timeout_s: float) -> EventBatch:
        """Events from number `after` on; waits up to `timeout_s` for one. Acknowledges all before it."""
        with self._lock:
            while self._first < after and self._outbox:
                self._outbox.popleft()
                self._first += 1
            self._grown.wait_for(lambda: self._first + len(self._outbox) > after, timeout_s)
            self._forget_ended()
            offset = max(after - self._first, 0)
            batch = tuple(self._outbox)[offset:]
            return EventBatch(next=self._first + offset + len(batch), events=batch)

    def live(self) -> tuple[LiveRequest, ...]:
        with self._lock:
            self._forget_ended()
            return tuple(kept.facts() for kept in self._kept.values())

    def load(self) -> LaneLoad:
        with self._lock:
            return self._scheduler.load(self.lane)

    def drain(self) -> None:
        """Take no new requests; those admitted go on."""
        with self._lock:
            self._closed = self._closed or "the lane is draining"

    def fail(self, reason: str) -> None:
        """End every live request with an error event that gives `reason`, and take no more."""
        with self._lock:
            self._closed = reason
            self.has_failed = True
            for kept in self._kept.values():
                for index, finish in enumerate(kept.finish):
                    if finish is None:
                        self._publish((_error_event(kept, index, reason),))

    # -- the step loop's side --------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        with self._lock:
            return self._scheduler.has_work

    def plan(self, generation: Generation, step: int, *, prefill: bool = True) -> StepPlan:
        """The next step; at most one other may be uncommitted. Whoever has run out of time ends first."""
        with self._lock:
            now_s = self._clock()
            self._publish(self._scheduler.expire(now_s))
            return self._scheduler.plan(generation, step, now_s, prefill=prefill)

    def end(self, faults: Mapping[RequestId, str], *, is_spoiled: bool) -> None:
        """End these requests with an error event each; before the step that showed it is committed.

        `is_spoiled`: they got wrong numbers, which others may have found in the cache; elsewhere they may get
        right ones. Else it is what was asked for that cannot be done, here or anywhere.
        """
        if not faults:
            return
        with self._lock:
            for request_id, reason in faults.items():
                events = self._scheduler.abort(request_id, is_spoiled=is_spoiled)
                self._publish(
                    tuple(
                        replace(event, finish=FinishReason.ERROR, error=reason, retry_can_help=is_spoiled)
                        for event in events
                    )
                )

    def commit(self, result: StepResult) -> None:
        """The oldest step that was planned with grants."""
        with self._lock:
            self._publish(self._scheduler.commit(result, self._clock()))

    def _reply(self, request: Request) -> AdmitReply:
        try:
            check_request(request, self._vocab_size)
            if request.sampling.constraint is not None:
                self._check_constraint(request.sampling.constraint)
            with self._lock:
                self._admit(request)
        except RequestError as error:
            return AdmitReply(request_id=request.request_id, error=str(error), field=error.field)
        except (CapacityError, UnavailableError) as error:
            return AdmitReply(request_id=request.request_id, error=str(error), retry_can_help=True)
        return AdmitReply(request_id=request.request_id)

    # -- under the lock --------------------------------------------------------------------------------

    def _admit(self, request: Request) -> None:
        known = self._kept.get(request.request_id)
        if known is not None:
            if known.request != request:
                raise RequestError("request_id", f"{request.request_id} is in use by another request")
        elif self._closed:
            raise UnavailableError(self._closed)
        else:
            events = self._scheduler.add(request, self._clock())
            self._kept[request.request_id] = _Kept(request)
            self._publish(events)

    def _publish(self, events: tuple[Event, ...]) -> None:
        now_s = self._clock()
        for event in events:
            self._kept[event.request_id].append(event, now_s)
            self._outbox.append(event)
        if events:
            self._grown.notify_all()

    def _forget_ended(self) -> None:
        horizon_s = self._clock() - self._retain_s
        ended = [k for k, kept in self._kept.items() if kept.ended_s is not None and kept.ended_s < horizon_s]
        for request_id in ended:
            del self._kept[request_id]


def _error_event(kept: _Kept, output_index: int, reason: str) -> Event:
    return Event(
        request_id=kept.request.request_id,
        output_index=output_index,
        first_index=len(kept.tokens[output_index]),
        finish=FinishReason.ERROR,
        error=reason,
        retry_can_help=True,
    )
