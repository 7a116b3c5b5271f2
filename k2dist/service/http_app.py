"""The HTTP face: paths, bodies, bounds, and errors in the form of the API that was called.

    /v1/chat/completions  /v1/completions  /v1/models       OpenAI's
    /v1/messages  /v1/messages/count_tokens                 Anthropic's
    /live  /ready  /health  /metrics  /v1/cluster           for whoever runs it (`http_operator`)
    /                                                       a page for people (`page`)

A gateway holds nothing that outlives a request: any of several can answer, and go on where another broke off.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from k2dist.errors import CapacityError, K2Error, RequestError
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
from k2dist.service.http_gate import ANTHROPIC_PATH, HttpGate, credentials, name_request, request_id
from k2dist.service.http_metrics import AnswerClock, HttpMetrics
from k2dist.service.http_operator import add_operator_paths
from k2dist.service.openai_call import OpenAICall
from k2dist.service.openai_requests import OpenAIAsked, read_chat_body, read_completion_body
from k2dist.service.page import add_page
from k2dist.service.request_ids import check_same, new_id
from k2dist.service.spans import Spans, read_traceparent
from k2dist.service.sse import Place, read_id

MAX_BODY_BYTES = 16 * 2**20  # what a gRPC message may have
_BODY_S = 60.0  # for a body to arrive
_INLINE_BYTES = 256 * 1024  # larger bodies are parsed in a thread: 5 ms of the event loop at most

T = TypeVar("T")


class Gateway:
    """What the handlers share. `max_running`: requests that generate at a time; more are refused."""

    def __init__(
        self, client: AsyncClient, model: str, gate: Gate, *, max_running: int, spans: Spans
    ) -> None:
        self.client = client
        self.gate = gate
        self.model = model
        self.max_running = max_running
        self.metrics = HttpMetrics(model)
        self.spans = spans
        self.began = int(time.time())

    def client_of(self, request: Request) -> AsyncClient:
        """For what is done for whoever sent the request, with its own key."""
        return self.client.on_behalf(credentials(request.headers))

    def begin(self, api: str, request: Request) -> AnswerClock:
        """Count a request in. CapacityError: there are as many as there may be."""
        if self.metrics.num_running >= self.max_running:
            raise CapacityError(f"{self.max_running} requests are under way in this gateway; try again later")
        parent = read_traceparent(request.headers.get("traceparent", ""))
        return self.metrics.begin(api, self.spans.begin(f"POST {request.url.path}", parent))


def make_app(gateway: Gateway) -> FastAPI:
    app = FastAPI(title="k2dist", docs_url=None, redoc_url=None)
    app.add_middleware(HttpGate, gate=gateway.gate, form=_form)
    _add_errors(app)
    _add_openai(app, gateway)
    _add_anthropic(app, gateway)
    add_operator_paths(app, gateway)
    add_page(app)
    return app


def _add_openai(app: FastAPI, gateway: Gateway) -> None:
    async def answer(
        request: Request, prefix: str, read: Callable[[dict[str, Any], str], OpenAIAsked]
    ) -> Response:
        posted = await _receive(request, prefix)
        asked = await _translated(posted, read)
        posted.check_resumable(is_streamed=asked.is_streamed)
        clock = gateway.begin("openai", request)
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
        served = await _model(gateway)
        pages = {"has_more": False, "first_id": served["id"], "last_id": served["id"]}
        return JSONResponse({"object": "list", "data": [served]} | pages)

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        found = await _model(gateway)
        if name != found["id"]:
            raise UnknownModelError("model", f"{name!r} is not served here; use {found['id']!r}")
        return JSONResponse(found)


async def _model(gateway: Gateway) -> dict[str, Any]:
    """With the fields of both APIs, whose clients ask for it at the same path."""
    (model,) = await gateway.client.models()
    openai = {"object": "model", "created": gateway.began, "owned_by": "k2dist"}
    began = datetime.fromtimestamp(gateway.began, UTC).isoformat().replace("+00:00", "Z")
    anthropic = {"type": "model", "display_name": model.name, "created_at": began}
    return {"id": model.name, "max_model_len": model.max_positions} | openai | anthropic


def _add_anthropic(app: FastAPI, gateway: Gateway) -> None:
    @app.post("/v1/messages")
    async def messages(request: Request) -> Response:
        posted = await _receive(request, "msg_")
        asked = await _translated(posted, read_messages_body)
        posted.check_resumable(is_streamed=asked.is_streamed)
        clock = gateway.begin("anthropic", request)
        return Exchange(
            AnthropicCall(gateway.client_of(request), asked, posted.request_id, clock, posted.places)
        )

    @app.post("/v1/messages/count_tokens")
    async def count(request: Request) -> Response:
        posted = await _receive(request, "msg_")
        chat = await _translated(posted, lambda fields, _: read_count_body(fields))
        return JSONResponse({"input_tokens": await count_tokens(gateway.client_of(request), chat)})


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
    reply = _form(request.url.path)(error, request_id(request.scope))
    return JSONResponse(reply.body, status_code=reply.status, headers=reply.headers)


def _form(path: str) -> ErrorForm:
    """Of the API that is at this path."""
    return anthropic_error if path.startswith(ANTHROPIC_PATH) else openai_error


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
        posted = _Posted(fields, new_id(prefix, fields, int(time.time())), None, len(body))
    else:
        begun_id, places = read_id(last_id)
        check_same(begun_id, prefix, fields)
        posted = _Posted(fields, begun_id, places, len(body))
    name_request(request.scope, posted.request_id)
    return posted


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
