"""What happened to one request, from its arrival to its end: times, counts, no text. Pure.

arrived ── queue ──> sent ── admission ──> accepted ── prefill ──> first token ── decode ──> ended
coordinator's queue   to a lane, and its    in the lane's queue,    of any output
                      answer                then its prompt
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from k2dist.messages import Course, Event, Message, Request


class OutputTrace(Message, frozen=True, kw_only=True):
    """One output; times in seconds after the request's arrival, None for what has not happened."""

    first_token_s: float | None = None
    last_token_s: float | None = None
    ended_s: float | None = None
    num_tokens: int = 0
    finish: str = ""
    error: str = ""
    course: Course | None = None


class Trace(Message, frozen=True, kw_only=True):
    """One request; times as in `OutputTrace`."""

    request_id: str
    arrived_at: float  # seconds since 1970
    tenant: str
    priority: int
    num_prompt_tokens: int
    lane: int | None = None
    sent_s: float | None = None
    accepted_s: float | None = None
    ended_s: float | None = None
    error: str = ""  # why no lane took it
    outputs: tuple[OutputTrace, ...] = ()


class Phase(NamedTuple):
    """A stretch of a request's way, in seconds after its arrival."""

    name: str
    began_s: float
    ended_s: float


class OutputWay:
    """One output, as its events come."""

    __slots__ = ("course", "ended_s", "error", "finish", "first_s", "last_s", "num_tokens")

    def __init__(self) -> None:
        self.first_s: float | None = None
        self.last_s: float | None = None
        self.ended_s: float | None = None
        self.num_tokens = 0
        self.finish = ""
        self.error = ""
        self.course: Course | None = None


class Journey:
    """One request's way. `now_s` of a steady clock; `wall_s`: seconds since 1970 at its arrival.

    `parent`: the W3C traceparent that the request came with, or "".
    """

    def __init__(self, request: Request, now_s: float, wall_s: float, parent: str) -> None:
        self.request_id = request.request_id
        self.tenant = request.tenant
        self.priority = request.priority
        self.num_prompt_tokens = len(request.prompt)
        self.parent = parent
        self.wall_s = wall_s
        self.arrived_s = now_s
        self.lane: int | None = None
        self.sent_s: float | None = None
        self.accepted_s: float | None = None
        self.first_s: float | None = None
        self.ended_s: float | None = None
        self.error = ""
        self.outputs = [OutputWay() for _ in range(request.num_outputs)]

    def end_output(self, way: OutputWay, event: Event, now_s: float) -> bool:
        """An output's last event; whether the request has ended by it."""
        assert event.finish is not None, "it goes on"
        way.finish, way.error, way.ended_s = event.finish.value, event.error, now_s
        if all(output.ended_s is not None for output in self.outputs):
            self.ended_s = now_s
        return self.ended_s is not None

    @property
    def queued_s(self) -> float | None:
        """In the coordinator's queue and its lane's together; None until the first token shows the latter."""
        course = self.outputs[0].course
        if self.sent_s is None or course is None:
            return None
        return self.sent_s - self.arrived_s + course.queued_s

    def phases(self) -> Iterator[Phase]:
        """Those that are over, or that the end cut off."""
        names = ("queue", "admission", "prefill", "decode")
        marks = (self.arrived_s, self.sent_s, self.accepted_s, self.first_s, self.ended_s)
        for name, began_s, over_s in zip(names, marks, marks[1:], strict=False):
            ended_s = over_s if over_s is not None else self.ended_s
            if began_s is not None and ended_s is not None:
                yield Phase(name, began_s - self.arrived_s, ended_s - self.arrived_s)

    def trace(self) -> Trace:
        return Trace(
            request_id=self.request_id,
            arrived_at=self.wall_s,
            tenant=self.tenant,
            priority=self.priority,
            num_prompt_tokens=self.num_prompt_tokens,
            lane=self.lane,
            sent_s=self._since(self.sent_s),
            accepted_s=self._since(self.accepted_s),
            ended_s=self._since(self.ended_s),
            error=self.error,
            outputs=tuple(
                OutputTrace(
                    first_token_s=self._since(way.first_s),
                    last_token_s=self._since(way.last_s),
                    ended_s=self._since(way.ended_s),
                    num_tokens=way.num_tokens,
                    finish=way.finish,
                    error=way.error,
                    course=way.course,
                )
                for way in self.outputs
            ),
        )

    def _since(self, time_s: float | None) -> float | None:
        return None if time_s is None else time_s - self.arrived_s
