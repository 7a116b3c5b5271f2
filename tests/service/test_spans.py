"""Spans of a request hang together from the client's traceparent to its phases, also at a real receiver."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import msgspec
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from k2dist.config.cluster import ClusterConfig, ObserveConfig
from k2dist.service import coordinator_actor, gateway_actor
from k2dist.service.spans import Spans, read_traceparent
from k2dist.text.tokenizer import Tokenizer
from tests.service.fake_lane import FakeLane
from tests.service.http_clients import HELLO, post_stream
from tests.service.http_server import ServeHttp

CHAT = "/v1/chat/completions"
TRACE_ID, SPAN_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = f"00-{TRACE_ID}-{SPAN_ID}-01"
PHASES = ["queue", "admission", "prefill", "decode"]


class Exported:
    """What the gateway and the coordinator have exported, each into a memory of its own."""

    def __init__(self) -> None:
        self._exporters: list[InMemorySpanExporter] = []

    def open(self, service: str, cluster: str, *_: object) -> Spans:
        self._exporters.append(InMemorySpanExporter())
        return Spans(service, cluster, self._exporters[-1])

    def spans(self) -> tuple[ReadableSpan, ...]:
        return tuple(span for exporter in self._exporters for span in exporter.get_finished_spans())


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> Exported:
    exported = Exported()
    for module in (coordinator_actor, gateway_actor):
        monkeypatch.setattr(module, "open_spans", exported.open)
    return exported


def below(parent: ReadableSpan, spans: tuple[ReadableSpan, ...]) -> list[ReadableSpan]:
    assert parent.context is not None
    found = [s for s in spans if s.parent is not None and s.parent.span_id == parent.context.span_id]
    return sorted(found, key=lambda span: span.start_time or 0)


async def test_a_request_is_one_tree_below_its_callers_span(
    serve_http: ServeHttp, tokenizer: Tokenizer, exported: Exported
) -> None:
    async with serve_http(FakeLane(tokenizer, step_s=0.002)) as server:
        body = {"messages": HELLO, "n": 2, "max_tokens": 4}
        await server.http.post(CHAT, json=body, headers={"traceparent": PARENT})
    spans = exported.spans()
    (gateway,) = (span for span in spans if span.name == f"POST {CHAT}")
    assert gateway.parent is not None
    assert f"{gateway.parent.span_id:016x}" == SPAN_ID
    assert {f"{span.context.trace_id:032x}" for span in spans if span.context} == {TRACE_ID}
    (request,) = below(gateway, spans)
    assert request.name == "request"
    assert request.attributes is not None
    assert request.attributes["gen_ai.usage.output_tokens"] == 8
    assert request.attributes["k2dist.lane"] == 0
    phases = below(request, spans)
    assert [span.name for span in phases] == PHASES
    assert all(before.end_time == after.start_time for before, after in pairwise(phases)), "without a gap"
    assert (phases[0].start_time, phases[-1].end_time) == (request.start_time, request.end_time)
    assert len(spans) == 6, "none per token"


async def test_without_a_traceparent_a_trace_begins_here(
    serve_http: ServeHttp, tokenizer: Tokenizer, exported: Exported
) -> None:
    async with serve_http(FakeLane(tokenizer)) as server:
        await post_stream(server.http, CHAT, {"messages": HELLO, "max_tokens": 3})
        refused = await server.http.post(CHAT, json={"messages": HELLO, "max_tokens": 10**6})
        assert refused.status_code == 400
    spans = exported.spans()
    roots = [span for span in spans if span.parent is None]
    assert [span.name for span in roots] == [f"POST {CHAT}"] * 2
    ended = [root.attributes["k2dist.outcome"] for root in roots if root.attributes is not None]
    assert sorted(map(str, ended)) == ["error", "success"]
    assert sum(span.name == "decode" for span in spans) == 1


@pytest.mark.parametrize("value", ["", "00-zz", PARENT + "\r\nx: y", PARENT.upper()])
def test_what_is_no_traceparent_is_not_handed_on(value: str) -> None:
    assert read_traceparent(value) == ""
    assert read_traceparent(PARENT) == PARENT


class Receiver(http.server.BaseHTTPRequestHandler):
    """An OTLP collector in ten lines."""

    seen: ClassVar[list[tuple[str, bytes]]] = []

    def do_POST(self) -> None:
        self.seen.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Nothing on stderr."""


@pytest.fixture
def receiver() -> Iterator[str]:
    Receiver.seen.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Receiver) as server:
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        serving.join()


async def test_a_real_receiver_gets_them(
    serve_http: ServeHttp, tokenizer: Tokenizer, config: ClusterConfig, model_dir: Path, receiver: str
) -> None:
    traced = msgspec.structs.replace(config, observe=ObserveConfig(otlp_endpoint=receiver))
    async with serve_http(FakeLane(tokenizer), changed=traced) as server:
        await server.http.post(CHAT, json={"messages": HELLO, "max_tokens": 3})
    names: dict[str, list[str]] = {}
    for path, body in Receiver.seen:
        assert path == "/v1/traces"
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            service = next(
                a.value.string_value for a in resource.resource.attributes if a.key == "service.name"
            )
            spans = [span.name for scope in resource.scope_spans for span in scope.spans]
            names.setdefault(service, []).extend(spans)
    assert names["k2dist-gateway"] == [f"POST {CHAT}"]
    assert sorted(names["k2dist-coordinator"]) == sorted([*PHASES, "request"])
