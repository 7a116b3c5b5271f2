"""A coordinator's requests as it sees them: counts and times for metrics, a journey for each. Pure.

One `note` per event of a lane: a look-up, a few additions and a place in a histogram, 0.9 us on a 2-core
machine.
"""

from __future__ import annotations

from collections.abc import Callable

from k2dist.messages import Event, Message, Request
from k2dist.observe.histogram import Histogram, HistogramFacts
from k2dist.observe.journey import Journey, Trace

MAX_TENANTS = 64  # counted by name; a client may call itself anything, and each name is a row in Prometheus
OTHER_TENANTS = "(others)"

FIRST_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0)
NEXT_S = (0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 10.0)
WHOLE_S = (0.3, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0, 1280.0, 2560.0)
PART_S = (0.001, 0.01, 0.1, *WHOLE_S)
TOKENS = tuple(float(2**power) for power in range(0, 18, 2))


class TenantFacts(Message, frozen=True, kw_only=True):
    """One tenant's requests. `cached` tokens are among those of the prompt."""

    tenant: str
    num_prompt_tokens: int
    num_cached_tokens: int
    num_generated_tokens: int
    num_requests: dict[str, int]  # by outcome: success, error, abort, refused
    queued_s_total: float  # of those that got a token


class RequestFacts(Message, frozen=True, kw_only=True):
    """Since the coordinator began."""

    first_token_s: HistogramFacts
    next_token_s: HistogramFacts
    whole_s: HistogramFacts
    queue_s: HistogramFacts
    prefill_s: HistogramFacts
    decode_s: HistogramFacts
    prompt_tokens: HistogramFacts
    generated_tokens: HistogramFacts  # of each output
    num_ended: dict[str, int]  # outputs, by why they ended
    tenants: tuple[TenantFacts, ...]


class _Tenant:
    """What is counted of one."""

    __slots__ = ("num_cached", "num_generated", "num_prompt", "outcomes", "queued_s")

    def __init__(self) -> None:
        self.num_prompt = self.num_cached = self.num_generated = 0
        self.outcomes: dict[str, int] = {}
        self.queued_s = 0.0

    def count(self, outcome: str) -> None:
        self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1


class RequestBook:
    """See the module. `on_end` is told of each request that has ended, or was refused."""

    def __init__(self, on_end: Callable[[Journey], None] = lambda journey: None) -> None:
        self._on_end = on_end
        self._known: dict[str, tuple[Journey, _Tenant]] = {}
        self._tenants: dict[str, _Tenant] = {}
        self._num_ended: dict[str, int] = {}
        self._first_s, self._next_s, self._whole_s = Histogram(FIRST_S), Histogram(NEXT_S), Histogram(WHOLE_S)
        self._queue_s, self._prefill_s, self._decode_s = (Histogram(PART_S) for _ in range(3))
        self._prompt_tokens, self._generated_tokens = Histogram(TOKENS), Histogram(TOKENS)

    def arrive(self, request: Request, now_s: float, wall_s: float, parent: str = "") -> None:
        """A new request is queued."""
        journey = Journey(request, now_s, wall_s, parent)
        self._known[request.request_id] = journey, self._tenant(request.tenant)

    def send(self, request_id: str, lane: int, now_s: float) -> None:
        """It leaves the queue for a lane."""
        journey, _ = self._known[request_id]
        journey.lane, journey.sent_s = lane, now_s

    def accept(self, request_id: str, now_s: float) -> None:
        """The lane has it."""
        journey, tenant = self._known[request_id]
        journey.accepted_s = now_s
        self._prompt_tokens.observe(journey.num_prompt_tokens)
        tenant.num_prompt += journey.num_prompt_tokens

    def refuse(self, request_id: str, error: str, now_s: float) -> None:
        """No lane takes it. It is forgotten."""
        known = self._known.pop(request_id, None)
        if known is not None:
            journey, tenant = known
            journey.error, journey.ended_s = error, now_s
            tenant.count("refused")
            self._on_end(journey)

    def note(self, event: Event, now_s: float) -> None:
        """An event of an accepted request, each token once."""
        known = self._known.get(event.request_id)
        if known is None:
            return
        journey, tenant = known
        way = journey.outputs[event.output_index]
        num_tokens = len(event.token_ids)
        if event.course is not None:
            way.course = event.course
        if num_tokens:
            if way.last_s is not None:
                self._next_s.observe((now_s - way.last_s) / num_tokens, num_tokens)
            else:
                way.first_s = now_s
                if journey.first_s is None:
                    self._take_first(journey, tenant, now_s)
            way.last_s = now_s
            way.num_tokens += num_tokens
            tenant.num_generated += num_tokens
        if event.finish is not None and way.ended_s is None:
            self._num_ended[event.finish] = self._num_ended.get(event.finish, 0) + 1
            self._generated_tokens.observe(way.num_tokens)
            if journey.end_output(way, event, now_s):
                self._take_end(journey, tenant, now_s)

    def forget(self, request_id: str) -> None:
        """An ended request can no longer be asked for."""
        self._known.pop(request_id, None)

    def trace(self, request_id: str) -> Trace | None:
        """What has happened to it so far; None if it is not known (any more)."""
        known = self._known.get(request_id)
        return None if known is None else known[0].trace()

    def facts(self) -> RequestFacts:
        return RequestFacts(
            first_token_s=self._first_s.facts(),
            next_token_s=self._next_s.facts(),
            whole_s=self._whole_s.facts(),
            queue_s=self._queue_s.facts(),
            prefill_s=self._prefill_s.facts(),
            decode_s=self._decode_s.facts(),
            prompt_tokens=self._prompt_tokens.facts(),
            generated_tokens=self._generated_tokens.facts(),
            num_ended={str(reason): count for reason, count in self._num_ended.items()},
            tenants=tuple(
                TenantFacts(
                    tenant=name,
                    num_prompt_tokens=tenant.num_prompt,
                    num_cached_tokens=tenant.num_cached,
                    num_generated_tokens=tenant.num_generated,
                    num_requests=dict(tenant.outcomes),
                    queued_s_total=tenant.queued_s,
                )
                for name, tenant in sorted(self._tenants.items())
            ),
        )

    def _take_first(self, journey: Journey, tenant: _Tenant, now_s: float) -> None:
        journey.first_s = now_s
        self._first_s.observe(now_s - journey.arrived_s)
        queued_s, course = journey.queued_s, journey.outputs[0].course
        if queued_s is not None and course is not None:
            tenant.queued_s += queued_s
            tenant.num_cached += course.cached_tokens
            self._queue_s.observe(queued_s)
            self._prefill_s.observe(max(now_s - journey.arrived_s - queued_s, 0.0))

    def _take_end(self, journey: Journey, tenant: _Tenant, now_s: float) -> None:
        reasons = {way.finish for way in journey.outputs}
        outcome = "error" if reasons & {"error", "timeout"} else "abort" if "abort" in reasons else "success"
        tenant.count(outcome)
        if journey.first_s is not None:
            self._decode_s.observe(now_s - journey.first_s)
        if outcome == "success":
            self._whole_s.observe(now_s - journey.arrived_s)
        self._on_end(journey)

    def _tenant(self, tenant: str) -> _Tenant:
        if tenant not in self._tenants and len(self._tenants) >= MAX_TENANTS:
            tenant = OTHER_TENANTS
        return self._tenants.setdefault(tenant, _Tenant())
