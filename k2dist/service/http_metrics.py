"""What a gateway sees of its requests, and what the lanes say of themselves, for Prometheus.

Names are vLLM's with our prefix, so that dashboards need no more than a rename. Nothing is global: a registry
belongs to one gateway.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from k2dist._proto.v1 import control_pb2
from k2dist.service.answer_events import AnswerEvent, Delta, Finished
from k2dist.service.step_gauges import StepGauges

_FIRST_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0)
_NEXT_S = (0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 10.0)
_WHOLE_S = (0.3, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0, 1280.0, 2560.0)

Clock = Callable[[], float]


class HttpMetrics:
    """One gateway's. `model` labels all of them."""

    def __init__(self, model: str, clock: Clock = time.monotonic) -> None:
        self.registry = CollectorRegistry()
        self.clock = clock
        self.num_running = 0  # requests that generate
        self._model = model
        self.first_token_s = self._histogram(
            "time_to_first_token_seconds", "From a request's arrival to its first token.", _FIRST_S
        )
        self.next_token_s = self._histogram(
            "inter_token_latency_seconds", "Between tokens of one output, as they reach the gateway.", _NEXT_S
        )
        self.whole_s = self._histogram(
            "e2e_request_latency_seconds", "From a request's arrival to the end of its answer.", _WHOLE_S
        )
        self._prompt = self._counter("prompt_tokens", "Prompt tokens of accepted requests.")
        self._cached = self._counter("prompt_tokens_cached", "Prompt tokens that were in the cache.")
        self._generated = self._counter("generation_tokens", "Tokens generated.")
        self._outputs = self._counter("request_success", "Outputs that ended, by reason.", "finished_reason")
        self._requests = self._counter(
            "http_requests", "Requests that generate, by outcome.", "api", "outcome"
        )
        self._streams = self._gauge("http_requests_running", "Requests under way in this gateway.")
        self._running = self._gauge("num_requests_running", "Outputs that hold pages.", "lane")
        self._waiting = self._gauge("num_requests_waiting", "Outputs admitted that wait for pages.", "lane")
        self._pages = self._gauge("kv_cache_usage_perc", "Pages in use, 0 to 1.", "lane")
        self._steps = self._gauge("lane_steps", "Steps that the lane has committed.", "lane")
        self._queued = self._gauge("num_requests_queued", "Requests that no lane has taken yet.")
        self._step = StepGauges(self.registry, model)

    def begin(self, api: str) -> AnswerClock:
        """A request has come."""
        return AnswerClock(self, api)

    def show(self, topology: control_pb2.GetTopologyResponse | None) -> bytes:
        """Prometheus' text. Without a topology the lanes' metrics are left out: old ones would be lies."""
        self._streams.labels(self._model).set(self.num_running)
        for gauge in (self._running, self._waiting, self._pages, self._steps):
            gauge.clear()
        self._step.show(topology)
        if topology is not None:
            self._queued.labels(self._model).set(topology.queued_requests)
            for lane in topology.lanes:
                labels = (self._model, str(lane.lane))
                num_used = lane.num_pages - lane.num_pages_free
                self._running.labels(*labels).set(lane.num_running)
                self._waiting.labels(*labels).set(lane.num_waiting)
                self._pages.labels(*labels).set(num_used / max(lane.num_pages, 1))
                self._steps.labels(*labels).set(lane.num_steps)
        return generate_latest(self.registry)

    def _take_end(self, finished: Finished, *, is_first: bool) -> None:
        self._outputs.labels(self._model, finished.reason.value).inc()
        self._generated.labels(self._model).inc(finished.usage.completion_tokens)
        if is_first:
            self._prompt.labels(self._model).inc(finished.usage.prompt_tokens)
            self._cached.labels(self._model).inc(finished.usage.cached_tokens)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(f"k2dist_{name}", text, ["model_name"], registry=self.registry, buckets=buckets)
        histogram.labels(self._model)
        return histogram

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"k2dist_{name}", text, ["model_name", *labels], registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"k2dist_{name}", text, ["model_name", *labels], registry=self.registry)


class AnswerClock:
    """One request's times. `end` counts its outcome once, and the first to say so wins."""

    def __init__(self, metrics: HttpMetrics, api: str) -> None:
        self._metrics = metrics
        self._api = api
        self._began_s = metrics.clock()
        self._last_s: dict[tuple[int, int], float] = {}
        self._has_ended = False
        metrics.num_running += 1

    def note(self, event: AnswerEvent, prompt_index: int = 0) -> None:
        """An event of the answer has come."""
        metrics, now_s = self._metrics, self._metrics.clock()
        if isinstance(event, Delta) and event.token_ids:
            output = (prompt_index, event.output_index)
            before_s = self._last_s.get(output)
            if before_s is not None:
                step_s = (now_s - before_s) / len(event.token_ids)
                for _ in event.token_ids:
                    metrics.next_token_s.labels(metrics._model).observe(step_s)
            elif not self._last_s:
                metrics.first_token_s.labels(metrics._model).observe(now_s - self._began_s)
            self._last_s[output] = now_s
        elif isinstance(event, Finished):
            metrics._take_end(event, is_first=event.output_index == 0)

    def end(self, outcome: str) -> None:
        """`outcome`: success, error or abort."""
        if self._has_ended:
            return
        self._has_ended = True
        metrics = self._metrics
        metrics.num_running -= 1
        metrics._requests.labels(metrics._model, self._api, outcome).inc()
        if outcome == "success":
            metrics.whole_s.labels(metrics._model).observe(metrics.clock() - self._began_s)
