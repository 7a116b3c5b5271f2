"""Spans of requests for OpenTelemetry, joined by W3C's traceparent: per request and phase, none per token.

    POST /v1/chat/completions      gateway: from the request's arrival to the last byte of its answer
    └── request                    coordinator: from its arrival to its end
        ├── queue                  until it is sent to a lane
        ├── admission              until the lane has it
        ├── prefill                until the first token
        └── decode                 until the end

Without an endpoint nothing is made, and a traceparent that comes is handed on as it is.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from k2dist.observe import Journey

if TYPE_CHECKING:  # the SDK is imported where spans are wanted
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter

_NS = 10**9
_FLUSH_MS = 2_000
_HEADER = "traceparent"
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


class OpenSpan:
    """A span that is under way. `traceparent`: what to send to whoever does a part of it."""

    def __init__(self, span: Any, traceparent: str) -> None:
        self.traceparent = traceparent
        self._span = span

    def end(self, outcome: str) -> None:
        """`outcome`: success, error or abort."""
        if self._span is not None:
            self._span.set_attribute("k2dist.outcome", outcome)
            if outcome == "error":
                self._span.set_status(_error(""))
            self._span.end()


class Spans:
    """Of one process, called `service`. `exporter`: where spans go; None: none are made.

    `share`: of traces that begin here, so many are kept; one that comes with a traceparent goes by that.
    """

    def __init__(self, service: str, cluster: str, exporter: SpanExporter | None, share: float = 1.0) -> None:
        self._provider = None if exporter is None else _provider(service, cluster, exporter, share)
        self._tracer = None if self._provider is None else self._provider.get_tracer("k2dist")

    def begin(self, name: str, traceparent: str) -> OpenSpan:
        """A span that begins now, below the one that `traceparent` names, if it names any."""
        if self._tracer is None:
            return OpenSpan(None, traceparent)
        from opentelemetry.trace import SpanKind

        span = self._tracer.start_span(name, context=_context(traceparent), kind=SpanKind.SERVER)
        return OpenSpan(span, _traceparent(span))

    def tell(self, journey: Journey) -> None:
        """The spans of a request that has ended."""
        if self._tracer is None:
            return
        from opentelemetry.trace import SpanKind, set_span_in_context

        assert journey.ended_s is not None, "it goes on"
        began_ns = int(journey.wall_s * _NS)  # integers: a float of this size is only good to 256 ns
        span = self._tracer.start_span(
            "request",
            context=_context(journey.parent),
            kind=SpanKind.SERVER,
            start_time=began_ns,
            attributes=_attributes(journey),
        )
        failure = journey.error or next((way.error for way in journey.outputs if way.error), "")
        if failure:
            span.set_status(_error(failure))
        below = set_span_in_context(span)
        for phase in journey.phases():
            part = self._tracer.start_span(
                phase.name, context=below, start_time=began_ns + int(phase.began_s * _NS)
            )
            part.end(began_ns + int(phase.ended_s * _NS))
        span.end(began_ns + int((journey.ended_s - journey.arrived_s) * _NS))

    def close(self) -> None:
        """Send what is not sent yet, within a bound."""
        if self._provider is not None:
            self._provider.force_flush(_FLUSH_MS)
            self._provider.shutdown()


def open_spans(service: str, cluster: str, endpoint: str | None, share: float) -> Spans:
    """`endpoint`: an OpenTelemetry collector that takes OTLP over HTTP, such as http://collector:4318."""
    if endpoint is None:
        return Spans(service, cluster, None)
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return Spans(service, cluster, OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces"), share)


def read_traceparent(value: str) -> str:
    """The header if it is one, else "": whatever a client sends is not handed on."""
    return value if _TRACEPARENT.fullmatch(value) else ""


def _provider(service: str, cluster: str, exporter: SpanExporter, share: float) -> TracerProvider:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

    resource = Resource({"service.name": f"k2dist-{service}", "service.namespace": cluster})
    provider = TracerProvider(
        sampler=ParentBased(TraceIdRatioBased(share)), resource=resource, shutdown_on_exit=False
    )
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider


def _context(traceparent: str) -> Any:
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator().extract({_HEADER: traceparent} if traceparent else {})


def _traceparent(span: Any) -> str:
    from opentelemetry.trace import set_span_in_context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier, set_span_in_context(span))
    return carrier.get(_HEADER, "")


def _attributes(journey: Journey) -> dict[str, Any]:
    courses = [way.course for way in journey.outputs if way.course is not None]
    found: dict[str, Any] = {
        "k2dist.request_id": journey.request_id,
        "k2dist.tenant": journey.tenant,
        "k2dist.outputs": len(journey.outputs),
        "k2dist.finish_reasons": [way.finish for way in journey.outputs if way.finish],
        "gen_ai.usage.input_tokens": journey.num_prompt_tokens,
        "gen_ai.usage.output_tokens": sum(way.num_tokens for way in journey.outputs),
        "k2dist.cached_tokens": max((course.cached_tokens for course in courses), default=0),
        "k2dist.prompt_chunks": sum(course.num_chunks for course in courses),
        "k2dist.preemptions": sum(course.num_preemptions for course in courses),
    }
    if journey.lane is not None:
        found["k2dist.lane"] = journey.lane
    return found


def _error(message: str) -> Any:
    from opentelemetry.trace import Status, StatusCode

    return Status(StatusCode.ERROR, message)
