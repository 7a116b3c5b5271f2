"""Requests into the lanes of this process as these drain, and what became of them back.

put(request) ──> lane with the fewest outputs under way ── events ──> wait() ──> ids of those that ended
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from k2dist.engine.lane import LanePort
from k2dist.errors import CapacityError, RequestError
from k2dist.ids import RequestId
from k2dist.messages import Event, FinishReason, Request, TokenLogprob, Usage


@dataclass(slots=True)
class Generated:
    """One output so far; `finish` is None while it runs. The token that ended it is one of its tokens."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)  # of output 0: prompt[1:]
    finish: FinishReason | None = None
    stop_match: str | int | None = None
    usage: Usage | None = None
    error: str = ""

    def add(self, event: Event) -> None:
        self.token_ids += event.token_ids
        self.logprobs += event.logprobs
        self.prompt_logprobs += event.prompt_logprobs
        if event.finish is not None:
            self.finish, self.stop_match = event.finish, event.stop_match
            self.usage, self.error = event.usage, event.error


@dataclass(slots=True)
class _UnderWay:
    lane: int
    outputs: list[Generated]
    num_running: int


class Feed:
    """One caller's requests in some lanes, of which it is the only reader meanwhile. Not thread-safe.

    lane_outputs: how many outputs a lane may have under way before `room` sends nobody more to it. With at
    most `scheduler.max_waiting` no lane ever refuses for being full.
    """

    def __init__(self, ports: Sequence[LanePort], *, lane_outputs: int) -> None:
        self._ports = ports
        self._lane_outputs = lane_outputs
        self._after = [port.events(0, 0.0).next for port in ports]  # what came before is not ours
        self._num_outputs = [0] * len(ports)
        self._under_way: dict[RequestId, _UnderWay] = {}

    def __len__(self) -> int:
        """Requests under way."""
        return len(self._under_way)

    def room(self, num_outputs: int) -> int | None:
        """The lane for a request of so many outputs; None while all are full. An idle lane takes any."""
        lane = min(range(len(self._ports)), key=self._num_outputs.__getitem__)
        busy = self._num_outputs[lane]
        return lane if busy == 0 or busy + num_outputs <= self._lane_outputs else None

    def put(self, request: Request, lane: int) -> list[Generated]:
        """Its outputs, which `wait` fills. RequestError for a request that this lane can never serve;
        CapacityError if it is full, draining or has failed.
        """
        (reply,) = self._ports[lane].admit((request,))
        if reply.error and reply.retry_can_help:
            raise CapacityError(reply.error)
        if reply.error:
            raise RequestError(reply.field, reply.error.removeprefix(f"{reply.field}: "))
        outputs = [Generated() for _ in range(request.num_outputs)]
        self._under_way[request.request_id] = _UnderWay(lane, outputs, len(outputs))
        self._num_outputs[lane] += len(outputs)
        return outputs

    def wait(self, timeout_s: float) -> list[RequestId]:
        """Take what the lanes have, waiting about `timeout_s` for it; the requests that have ended by it."""
        busy = [lane for lane, num_outputs in enumerate(self._num_outputs) if num_outputs > 0]
        ended: list[RequestId] = []
        for lane in busy:
            batch = self._ports[lane].events(self._after[lane], timeout_s / len(busy))
            self._after[lane] = batch.next
            for event in batch.events:
                ended += self._take(event)
        return ended

    def cancel(self) -> None:
        """End all that is under way, and forget it."""
        for lane, port in enumerate(self._ports):
            port.cancel(tuple(i for i, request in self._under_way.items() if request.lane == lane))
            self._num_outputs[lane] = 0
        self._under_way.clear()

    def _take(self, event: Event) -> tuple[RequestId, ...]:
        request = self._under_way.get(event.request_id)
        if request is None:
            return ()  # of a request that somebody else admitted
        request.outputs[event.output_index].add(event)
        if event.finish is not None:
            request.num_running -= 1
            self._num_outputs[request.lane] -= 1
        if request.num_running > 0:
            return ()
        del self._under_way[event.request_id]
        return (event.request_id,)
