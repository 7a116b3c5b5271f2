"""What `/metrics` of a gateway shows: its own HTTP requests, and the cluster's state that it has asked for.

Nothing is global: a registry belongs to one gateway. With several gateways the cluster's metrics come from
each of them alike; take one, or the maximum.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from k2dist.observe import ClusterState, SkewWindow
from k2dist.service.metric_table import Shown
from k2dist.service.metrics import PREFIX, StateCollector
from k2dist.service.spans import OpenSpan

Clock = Callable[[], float]


class HttpMetrics:
    """One gateway's. `model` labels all of them."""

    def __init__(self, model: str, clock: Clock = time.monotonic) -> None:
        self.registry = CollectorRegistry()
        self.num_running = 0  # requests that generate
        self._clock = clock
        self._model = model
        self._requests = Counter(
            f"{PREFIX}http_requests",
            "Requests that generate, by outcome.",
            ("model_name", "api", "outcome"),
            registry=self.registry,
        )
        self._running = Gauge(
            f"{PREFIX}http_requests_running",
            "Requests under way in this gateway.",
            ("model_name",),
            registry=self.registry,
        )
        self._skews = SkewWindow()
        self._collector = StateCollector(model)
        self.registry.register(self._collector)

    def begin(self, api: str, span: OpenSpan) -> AnswerClock:
        """A request has come."""
        return AnswerClock(self, api, span)

    def show(self, state: ClusterState | None) -> bytes:
        """Prometheus' text. Without a state the cluster's metrics are left out."""
        self._running.labels(self._model).set(self.num_running)
        ranks = () if state is None or state.world is None else state.world.ranks
        skew = self._skews.note(ranks, self._clock())
        self._collector.shown = None if state is None else Shown(state, skew)
        return generate_latest(self.registry)

    def count(self, api: str, outcome: str) -> None:
        self._requests.labels(self._model, api, outcome).inc()


class AnswerClock:
    """One request under way. `end` counts its outcome once, and the first to say so wins."""

    def __init__(self, metrics: HttpMetrics, api: str, span: OpenSpan) -> None:
        self._metrics = metrics
        self._api = api
        self._span = span
        self._has_ended = False
        metrics.num_running += 1

    @property
    def traceparent(self) -> str:
        """What the coordinator is told of the span that it works for."""
        return self._span.traceparent

    def end(self, outcome: str) -> None:
        """`outcome`: success, error or abort."""
        if self._has_ended:
            return
        self._has_ended = True
        self._metrics.num_running -= 1
        self._metrics.count(self._api, outcome)
        self._span.end(outcome)
