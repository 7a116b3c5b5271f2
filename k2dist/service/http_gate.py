"""No HTTP request gets past without its key, asked for before the body is read; each response has an id.

What is forwarded to the coordinator carries the client's own key, and is asked for it again there, where its
limits are counted. The id is the one that `k2dist inspect trace` takes, where the request has come so far as
to have one; SDKs show it with their errors.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from k2dist.errors import K2Error
from k2dist.service.auth import HEADERS, Gate
from k2dist.service.http_errors import ErrorForm
from k2dist.service.http_exchange import send_error
from k2dist.service.page import PAGE_PATHS

# Probes have no keys, and the page asks its reader for one.
OPEN_PATHS = frozenset((*PAGE_PATHS, "/live", "/ready", "/health"))
ANTHROPIC_PATH = "/v1/messages"
_METRICS = "/metrics"  # tells of all tenants
_ID = "k2dist.request_id"  # in a request's scope


class HttpGate:
    """ASGI middleware. `form`: errors in the form of the API at a path."""

    def __init__(self, app: ASGIApp, gate: Gate, form: Callable[[str], ErrorForm]) -> None:
        self._app = app
        self._gate = gate
        self._form = form

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if scope["type"] == "http" and path not in OPEN_PATHS:
            name_request(scope, f"req_{secrets.token_hex(16)}")
            send = _with_id(
                scope, b"request-id" if path.startswith(ANTHROPIC_PATH) else b"x-request-id", send
            )
            try:
                caller = self._gate.identify(credentials(Headers(scope=scope)))
                if path == _METRICS:
                    caller.check_role("monitor", "operator")
            except K2Error as error:
                await send_error(send, self._form(path)(error, request_id(scope)))
                return
        await self._app(scope, receive, send)


def name_request(scope: Scope, request_id: str) -> None:
    """What its response is to call it, from now on."""
    scope[_ID] = request_id


def request_id(scope: Scope) -> str:
    return str(scope.get(_ID, ""))


def _with_id(scope: Scope, header: bytes, send: Send) -> Send:
    async def tell(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message["headers"], (header, request_id(scope).encode())]
        await send(message)

    return tell


def credentials(headers: Headers) -> dict[str, str]:
    """What of a request's headers says who sent it."""
    return {name: headers[name] for name in HEADERS if name in headers}
