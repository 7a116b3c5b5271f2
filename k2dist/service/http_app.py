"""The HTTP face: paths, bodies, bounds, and errors in the form of the API that was called.

    /v1/chat/completions  /v1/completions  /v1/models       OpenAI's
    /v1/messages  /v1/messages/count_tokens                 Anthropic's
    /live  /ready  /health  /metrics                        for whoever runs it

A gateway holds nothing that outlives a request: any of several can answer, and go on where another broke off.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from k2dist._proto.v1 import control_pb2
from k2dist.errors import CapacityError, K2Error, RequestError, UnavailableError
from k2dist.service.anthropic_call import AnthropicCall, count_tokens
from k2dist.service.anthropic_requests import read_count_body, read_messages_body
from k2dist.service.auth import Gate
from k2dist.service.client import AsyncClient
from k2dist.service.http_body import read_object
from k2dist.service.http_errors import (
    BodyTooLargeError,
    ErrorForm,
    HttpError,
    UnknownModelError,
    anthropic_error,
    openai_error,
)
from k2dist.service.http_exchange import Exchange
from k2dist.service.http_gate import HttpGate, credentials
from k2dist.service.http_metrics import AnswerClock, HttpMetrics
from k2dist.service.openai_call import OpenAICall
from k2dist.service.openai_requests import OpenAIAsked, read_chat_body, read_completion_body
from k2dist.service.progress import LaneWork, Progress
from k2dist.service.request_ids import check_same, new_id
from k2dist.service.sse import Place, read_id

MAX_BODY_BYTES = 16 * 2**20  # what a gRPC message may have
_BODY_S = 60.0  # for a body to arrive
_LOOK_S = 5.0  # for the coordinator to say how its lanes are
_INLINE_BYTES = 256 * 1024  # larger bodies are parsed in a thread: 5 ms of the event loop at most

T = TypeVar("T")


class Gateway:
    """What the handlers share. `max_running`: requests that generate at a time; more are refused."""

    def __init__(
        self, client: AsyncClient, model: str, gate: Gate, *, max_running: int, stall_s: float
    ) -> None:
        self.client = client
        self.gate = gate
        self.model = model
        self.max_running = max_running
        self.metrics = HttpMetrics(model)
        self.progress = Progress(stall_s)
        self.began = int(time.time())

    def client_of(self, request: Request) -> AsyncClient:
        """For what is done for whoever sent the request, with its own key."""
        return self.client.on_behalf(credentials(request.headers))

    async def topology(self) -> control_pb2.GetTopologyResponse:
        """How the lanes are. UnavailableError: the coordinator does not say so in time."""
        try:
            return await asyncio.wait_for(self.client.topology(), _LOOK_S)
        except TimeoutError as error:
            raise UnavailableError(f"the coordinator did not answer within {_LOOK_S:g} s") from error

    def begin(self, api: str) -> AnswerClock:
        """Count a request in. CapacityError: there are as many as there may be."""
        if self.metrics.num_running >= self.max_running:
            raise CapacityError(f"{self.max_running} requests are under way in this gateway; try again later")
        return self.metrics.begin(api)


def make_app(gateway: Gateway) -> FastAPI:
    app = FastAPI(title="k2dist", docs_url=None, redoc_url=None)
    app.add_middleware(HttpGate, gate=gateway.gate, form=_form)
    _add_errors(app)
    _add_openai(app, gateway)
    _add_anthropic(app, gateway)
    _add_health(app, gateway)
    return app


def _add_openai(app: FastAPI, gateway: Gateway) -> None:
    async def answer(
        request: Request, prefix: str, read: Callable[[dict[str, Any], str], OpenAIAsked]
    ) -> Response:
        posted = await _receive(request, prefix)
        asked = await _translated(posted, read)
        posted.check_resumable(is_streamed=asked.is_streamed)
        clock = gateway.begin("openai")
        return Exchange(
            OpenAICall(gateway.client_of(request), asked, posted.request_id, clock, posted.places)
        )

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await answer(request, "chatcmpl-", read_chat_body)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await answer(request, "cmpl-", read_completion_body)

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [await _model(gateway)]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        found = await _model(gateway)
        if name != found["id"]:
            raise UnknownModelError("model", f"{name!r} is not served here; use {found['id']!r}")
        return JSONResponse(found)


async def _model(gateway: Gateway) -> dict[str, Any]:
    (model,) = await gateway.client.models()
    return {
        "id": model.name,
        "object": "model",
        "created": gateway.began,
        "owned_by": "k2dist",
        "max_model_len": model.max_positions,
    }


def _add_anthropic(app: FastAPI, gateway: Gateway) -> None:
    @app.post("/v1/messages")
    async def messages(request: Request) -> Response:
        posted = await _receive(request, "msg_")
        asked = await _translated(posted, read_messages_body)
        posted.check_resumable(is_streamed=asked.is_streamed)
        clock = gateway.begin("anthropic")
        return Exchange(
            AnthropicCall(gateway.client_of(request), asked, posted.request_id, clock, posted.places)
        )

    @app.post("/v1/messages/count_tokens")
    async def count(request: Request) -> Response:
        posted = await _receive(request, "msg_")
        chat = await _translated(posted, lambda fields, _: read_count_body(fields))
        return JSONResponse({"input_tokens": await count_tokens(gateway.client_of(request), chat)})


def _add_health(app: FastAPI, gateway: Gateway) -> None:
    @app.get("/live")
    async def live() -> Response:
        """This process answers."""
        return JSONResponse({"status": "live"})

    @app.get("/ready")
    async def ready() -> Response:
        """New requests are taken: lanes are there, and nothing drains."""
        try:
            topology = await gateway.topology()
        except K2Error as error:
            return _unwell(str(error))
        if topology.state != control_pb2.SERVICE_STATE_SERVING:
            return _unwell("draining")
        if not topology.lanes:
            return _unwell("no lane is left")
        return JSONResponse({"status": "ready", "lanes": len(topology.lanes)})

    @app.get("/health")
    async def health() -> Response:
        """Steps advance where there is work. Draining is no illness."""
        try:
            topology = await gateway.topology()
        except K2Error as error:
            return _unwell(str(error))
        if not topology.lanes:
            return _unwell("no lane is left")
        lanes = [
            LaneWork(lane.lane, lane.num_steps, lane.num_running + lane.num_waiting > 0)
            for lane in topology.lanes
        ]
        stalls = gateway.progress.look(lanes, time.monotonic())
        if stalls:
            found = (f"lane {lane} has work and made no step for {since_s:.0f} s" for lane, since_s in stalls)
            return _unwell("; ".join(found))
        return JSONResponse(
            {"status": "healthy", "steps": {str(lane.lane): lane.num_steps for lane in lanes}}
        )

    @app.get("/metrics")
    async def metrics() -> Response:
        topology = None
        with suppress(K2Error):  # what the gateway itself has seen is still true
            topology = await gateway.topology()
        return PlainTextResponse(gateway.metrics.show(topology), media_type=CONTENT_TYPE_LATEST)


def _unwell(reason: str) -> Response:
    return JSONResponse({"status": "unwell", "reason": reason}, status_code=503)


def _add_errors(app: FastAPI) -> None:
    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, K2Error)
        return _reply(request, error)

    async def unknown(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = f"{request.method} {request.url.path}: {error.detail}"
        return _reply(request, HttpError(error.status_code, message))

    async def broken(request: Request, error: Exception) -> Response:
        """A bug; whoever called shall not see its inside. The server logs it."""
        return _reply(request, K2Error("a bug in k2dist; its log says more"))

    async def left(request: Request, error: Exception) -> Response:
        return Response(status_code=400)  # nobody reads it

    app.add_exception_handler(K2Error, refused)
    app.add_exception_handler(HTTPException, unknown)
    app.add_exception_handler(ClientDisconnect, left)
    app.add_exception_handler(Exception, broken)


def _reply(request: Request, error: K2Error) -> Response:
    reply = _form(request.url.path)(error)
    headers = {"retry-after": str(reply.retry_after_s)} if reply.retry_after_s is not None else None
    return JSONResponse(reply.body, status_code=reply.status, headers=headers)


def _form(path: str) -> ErrorForm:
    """Of the API that is at this path."""
    return anthropic_error if path.startswith("/v1/messages") else openai_error


class _Posted(NamedTuple):
    """A body that has come. `places`: with Last-Event-ID, where the stream of `request_id` is read on."""

    fields: dict[str, Any]
    request_id: str
    places: Mapping[int, Place] | None
    num_bytes: int

    def check_resumable(self, *, is_streamed: bool) -> None:
        if self.places is not None and not is_streamed:
            raise RequestError("Last-Event-ID", "only a stream can be resumed; send stream: true")


async def _receive(request: Request, prefix: str) -> _Posted:
    body = await _body(request)
    fields = await _off_loop(len(body), lambda: read_object(body))
    last_id = request.headers.get("last-event-id")
    if last_id is None:
        return _Posted(fields, new_id(prefix, fields, int(time.time())), None, len(body))
    request_id, places = read_id(last_id)
    check_same(request_id, prefix, fields)
    return _Posted(fields, request_id, places, len(body))


async def _translated(posted: _Posted, read: Callable[[dict[str, Any], str], T]) -> T:
    return await _off_loop(posted.num_bytes, lambda: read(posted.fields, posted.request_id))


async def _off_loop(num_bytes: int, work: Callable[[], T]) -> T:
    return work() if num_bytes <= _INLINE_BYTES else await asyncio.to_thread(work)


async def _body(request: Request) -> bytes:
    """The body. BodyTooLargeError, and HttpError for one that does not arrive."""
    parts: list[bytes] = []
    num_bytes = 0
    try:
        async with asyncio.timeout(_BODY_S):
            async for part in request.stream():
                num_bytes += len(part)
                if num_bytes > MAX_BODY_BYTES:
                    raise BodyTooLargeError("", f"the body has more than {MAX_BODY_BYTES} bytes")
                parts.append(part)
    except TimeoutError as error:
        raise HttpError(408, f"the body did not arrive within {_BODY_S:g} s") from error
    return b"".join(parts)
