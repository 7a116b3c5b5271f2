"""The coordinator's shell: requests to lanes, lanes' events to readers, all on one event loop.

    open ──> Admission ──dispatch: lane.admit──> lane ──pump: events──> RequestLog ──> readers, at their pace
                 │                                ^
                 └──── refused                    └── lane.cancel: Abort, or the last reader left

The order, the lane and the record are decided by the pure cores of `k2dist.coordinator`; this awaits.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Generic, TypeVar

from k2dist.coordinator import Account, Admission, RequestLog, choose
from k2dist.errors import CapacityError, K2Error, PeerError, RequestError, UnavailableError
from k2dist.ids import LaneId, RequestId
from k2dist.messages import AdmitReply, Event, FinishReason, LaneLoad, Message, Request, Usage
from k2dist.observe import RequestBook
from k2dist.observe.event_log import EventLog
from k2dist.service.error_codes import AbortedError, UnknownRequestError, make_error
from k2dist.service.lane import Lane
from k2dist.service.owned_ids import outer_id
from k2dist.service.submission import Reader, Submission
from k2dist.service.tasks import Tasks

N = TypeVar("N")
_log = EventLog(logging.getLogger(__name__))


class AbortResult(enum.Enum):
    ABORTED = enum.auto()
    ALREADY_FINISHED = enum.auto()
    NOT_FOUND = enum.auto()


class AbortOutcome(Message, frozen=True, kw_only=True):
    result: AbortResult
    num_tokens: int = 0  # generated so far, of all outputs together


class CoordinatorLimits(Message, frozen=True, kw_only=True):
    max_queued: int  # requests that wait for a lane; more are refused
    queue_s: float  # how long one may wait
    lane_outputs: int  # outputs under way in one lane; beyond it requests wait here, in fair order
    log_bytes: int  # memory of the request log
    retain_s: float  # how long an ended request can still be read


class Coordinator(Generic[N]):
    """`lanes[i]` is lane i. Every method belongs to the event loop that `start` ran on."""

    def __init__(
        self,
        lanes: Sequence[Lane],
        limits: CoordinatorLimits,
        *,
        book: RequestBook | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._lanes = {LaneId(index): lane for index, lane in enumerate(lanes)}  # those that live
        self._limits = limits
        self._clock = clock
        self.book = book or RequestBook()
        self._admission = Admission(limits.max_queued)
        self._log = RequestLog(max_bytes=limits.log_bytes, retain_s=limits.retain_s)
        self._submissions: dict[RequestId, Submission[N]] = {}
        self._ended: deque[RequestId] = deque()  # in the order in which the log will drop them
        self._num_outputs = dict.fromkeys(self._lanes, 0)  # sent to a lane and not ended, by lane
        self._has_room = asyncio.Event()  # the dispatcher has something to look at
        self._is_idle = asyncio.Event()  # nothing queued, nothing under way
        self._is_idle.set()
        self._tasks = Tasks()
        self.is_draining = False
        self.on_change: Callable[[], None] = lambda: None  # lanes were lost, or it drains

    def start(self) -> None:
        self._tasks.spawn(self._dispatch())
        for lane_id in self._lanes:
            self._tasks.spawn(self._pump(lane_id), partial(self._lose, lane_id))

    async def stop(self) -> None:
        """End all work of this process; the lanes are left as they are."""
        await self._tasks.stop()

    async def drain(self, timeout_s: float) -> bool:
        """Take no more requests and wait for those taken; false if some went on after `timeout_s`."""
        self.is_draining = True
        self.on_change()
        try:
            async with asyncio.timeout(timeout_s):
                await self._is_idle.wait()
        except TimeoutError:
            return False
        await asyncio.gather(*(lane.drain() for lane in self._lanes.values()))
        return True

    # -- what clients ask ------------------------------------------------------------------------------

    def open(
        self,
        request: Request,
        note: N,
        *,
        is_detached: bool,
        account: Account | None = None,
        traceparent: str = "",
    ) -> Reader[N]:
        """Queue a new request and read it; its tokens are paid from `account`. CapacityError: no room;
        UnavailableError: none are taken.

        `traceparent`: W3C's, of the span that it came from, or "".
        """
        if self.is_draining:
            raise UnavailableError(
                "draining: no new requests are taken; send it to another cluster, or later"
            )
        if not self._lanes:
            raise UnavailableError("no lane is left; the cluster has to be restarted")
        now_s = self._clock()
        self._forget(now_s)
        self._admission.offer(request, now_s, deadline_s=now_s + self._limits.queue_s)
        submission = Submission(request, note, is_detached=is_detached, account=account)
        self._submissions[request.request_id] = submission
        self.book.arrive(request, now_s, time.time(), traceparent)
        self._is_idle.clear()
        self._has_room.set()
        return Reader(submission, self._log, self._leave)

    def attach(self, request_id: RequestId) -> Reader[N]:
        """Read a known request from its beginning, or from where `Reader.skip` says."""
        self._forget(self._clock())
        submission = self._submissions.get(request_id)
        if submission is None:
            raise UnknownRequestError(
                "request_id",
                f"{outer_id(request_id)!r} is not known; it may have ended {self._limits.retain_s:g} s ago",
            )
        return Reader(submission, self._log, self._leave)

    def find(self, request_id: RequestId) -> N | None:
        """The note of a known request."""
        submission = self._submissions.get(request_id)
        return submission.note if submission is not None else None

    async def abort(self, request_id: RequestId) -> AbortOutcome:
        submission = self._submissions.get(request_id)
        if submission is None:
            return AbortOutcome(result=AbortResult.NOT_FOUND)
        if self._admission.withdraw(request_id):
            self._refuse(submission, AbortedError(f"{outer_id(request_id)} was aborted before a lane had it"))
            return AbortOutcome(result=AbortResult.ABORTED)
        reader = Reader(submission, self._log, self._leave)
        try:
            lane_id = await reader.accepted()  # at once, unless it is on its way to a lane
        finally:
            reader.close()
        num_tokens = sum(
            len(self._log.tail(request_id, index, 0).token_ids)
            for index in range(submission.request.num_outputs)
        )
        if self._log.has_ended(request_id):
            return AbortOutcome(result=AbortResult.ALREADY_FINISHED, num_tokens=num_tokens)
        await self._cancel(lane_id, request_id)
        return AbortOutcome(result=AbortResult.ABORTED, num_tokens=num_tokens)

    async def loads(self) -> tuple[LaneLoad, ...]:
        """Of the lanes that live, by number."""
        return tuple(await asyncio.gather(*(lane.load() for lane in self._lanes.values())))

    @property
    def lanes(self) -> Mapping[LaneId, Lane]:
        """Those that live."""
        return self._lanes

    @property
    def num_queued(self) -> int:
        return len(self._admission)

    @property
    def num_outputs(self) -> int:
        """Outputs under way in all lanes."""
        return sum(self._num_outputs.values())

    def _leave(self, submission: Submission[N]) -> None:
        """A reader closed: end the request if nobody wants it any more."""
        request_id = submission.request.request_id
        if not submission.is_unwanted or submission.refusal is not None:
            return
        if self._admission.withdraw(request_id):
            self._refuse(submission, AbortedError(f"{outer_id(request_id)}: its client left"))
        elif submission.lane is not None and request_id in self._log and not self._log.has_ended(request_id):
            self._tasks.spawn(self._cancel(submission.lane, request_id))
        # else it is on its way to a lane, and `_admit` looks again

    # -- requests to lanes -----------------------------------------------------------------------------

    async def _dispatch(self) -> None:
        """Send queued requests to lanes as these have room, and refuse those that waited too long."""
        while True:
            self._has_room.clear()
            while self._send_next():
                pass
            deadline_s = self._admission.next_deadline_s()
            wait_s = None if deadline_s is None else max(deadline_s - self._clock(), 0.0)
            try:
                # Not wait_for: in Python 3.11 it can swallow a cancellation, and `stop` would wait for ever.
                async with asyncio.timeout(wait_s):
                    await self._has_room.wait()
            except TimeoutError:
                _log.debug("coordinator.queue_deadline")

    def _send_next(self) -> bool:
        """One decision of the cores carried out; false if there is none to make now."""
        loads = [
            LaneLoad(lane=lane_id, num_running=count, num_waiting=0, num_pages=0, num_pages_free=0)
            for lane_id, count in self._num_outputs.items()
            if lane_id in self._lanes and count < self._limits.lane_outputs
        ]
        admitted = self._admission.take(1 if loads else 0, self._clock())
        for request in admitted.expired:
            error = CapacityError(
                f"no lane had room within service.queue_s={self._limits.queue_s:g}; try again later"
            )
            self._refuse(self._submissions[request.request_id], error)
        for request in admitted.ready:
            lane_id = choose(loads)
            self._num_outputs[lane_id] += request.num_outputs
            submission = self._submissions[request.request_id]
            self.book.send(request.request_id, lane_id, self._clock())
            admission = self._admit(lane_id, self._lanes[lane_id], submission)
            self._tasks.spawn(admission, partial(self._refuse_sent, lane_id, submission))
        return bool(admitted.ready)

    async def _admit(self, lane_id: LaneId, lane: Lane, submission: Submission[N]) -> None:
        """Hand one request to its lane. It is accepted when the lane has replied and the log has it."""
        request = submission.request
        try:
            (reply,) = await lane.admit((request,))
            _raise_refusal(reply)
        except K2Error as error:
            self._refuse_sent(lane_id, submission, error)
            return
        try:
            self._log.open(request, lane_id, self._clock())
        except K2Error as error:
            self._refuse_sent(lane_id, submission, error)
            await self._cancel(lane_id, request.request_id)
            return
        submission.accept(lane_id)
        self.book.accept(request.request_id, self._clock())
        submission.pay(len(request.prompt), self._clock())
        for event in submission.early:
            self._record(lane_id, event)
        submission.early.clear()
        if submission.is_unwanted and not self._log.has_ended(request.request_id):
            await self._cancel(lane_id, request.request_id)

    async def _cancel(self, lane_id: LaneId, request_id: RequestId) -> None:
        lane = self._lanes.get(lane_id)
        if lane is None:
            return  # lost, and its requests with it
        try:
            await lane.cancel((request_id,))
        except K2Error as error:  # its pump sees the same and ends the lane's requests
            _log.warning("coordinator.cancel_failed", lane=lane_id, request_id=request_id, error=str(error))

    def _refuse_sent(self, lane_id: LaneId, submission: Submission[N], error: K2Error) -> None:
        self._free(lane_id, submission.request.num_outputs)
        self._refuse(submission, error)

    def _refuse(self, submission: Submission[N], error: K2Error) -> None:
        self._submissions.pop(submission.request.request_id, None)
        self.book.refuse(submission.request.request_id, str(error), self._clock())
        submission.refuse(error)
        self._note_idle()

    # -- events from lanes -----------------------------------------------------------------------------

    async def _pump(self, lane_id: LaneId) -> None:
        """Carry one lane's events into the log, until the lane is lost."""
        lane = self._lanes[lane_id]
        after = 0
        try:
            while True:
                batch = await lane.events(after)
                for event in batch.events:
                    self._record(lane_id, event)
                after = batch.next
        except K2Error as error:
            self._lose(lane_id, error)

    def _record(self, lane_id: LaneId, event: Event) -> None:
        submission = self._submissions.get(event.request_id)
        if submission is None:
            return  # refused or forgotten here, and cancelled there
        if submission.lane is None:
            submission.early.append(event)
            return
        now_s = self._clock()
        fresh = self._log.append(event, now_s)
        if fresh is None:
            return
        self.book.note(fresh, now_s)
        submission.pay(len(fresh.token_ids), self._clock())
        if fresh.finish is not None:
            self._free(lane_id, 1)
            if self._log.has_ended(event.request_id):
                self._ended.append(event.request_id)
        submission.wake()

    def _lose(self, lane_id: LaneId, error: K2Error) -> None:
        """The lane has died: every request that goes on in it ends with `error`."""
        _log.error("coordinator.lane_lost", lane=lane_id, error=str(error))
        del self._lanes[lane_id]
        self.on_change()
        for request in self._log.to_readmit(lane_id):
            for event in _failures(request, error):
                self._record(lane_id, event)
        if not self._lanes:
            for request in self._admission.take(len(self._admission), self._clock()).ready:
                self._refuse(
                    self._submissions[request.request_id], UnavailableError(f"no lane is left: {error}")
                )

    def _free(self, lane_id: LaneId, num_outputs: int) -> None:
        self._num_outputs[lane_id] -= num_outputs
        self._has_room.set()
        self._note_idle()

    def _note_idle(self) -> None:
        if not self._admission and self.num_outputs == 0:
            self._is_idle.set()

    def _forget(self, now_s: float) -> None:
        """Drop what the log has dropped."""
        self._log.expire(now_s)
        while self._ended and self._ended[0] not in self._log:
            request_id = self._ended.popleft()
            del self._submissions[request_id]
            self.book.forget(request_id)


def _raise_refusal(reply: AdmitReply) -> None:
    if not reply.error:
        return
    if reply.field:
        raise make_error(RequestError, reply.error, reply.field)
    raise CapacityError(reply.error) if reply.retry_can_help else PeerError(reply.error)


def _failures(request: Request, error: K2Error) -> list[Event]:
    """The end, by error, of each output of a request whose `generated` tokens are known."""
    return [
        Event(
            request_id=request.request_id,
            output_index=index,
            first_index=len(tokens),
            finish=FinishReason.ERROR,
            usage=Usage(prompt_tokens=len(request.prompt), completion_tokens=len(tokens)),
            error=str(error),
            retry_can_help=error.retry_can_help,
        )
        for index, tokens in request.generated.items()
    ]
