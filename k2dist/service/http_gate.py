"""No HTTP request gets past without its key: asked for before the body is read.

What is forwarded to the coordinator carries the client's own key, and is asked for it again there, where its
limits are counted.
"""

from __future__ import annotations

from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from k2dist.errors import K2Error
from k2dist.service.auth import HEADERS, Gate
from k2dist.service.http_errors import ErrorForm
from k2dist.service.http_exchange import send_error
from k2dist.service.page import PAGE_PATHS

# Probes have no keys, and the page asks its reader for one.
OPEN_PATHS = frozenset((*PAGE_PATHS, "/live", "/ready", "/health"))
_METRICS = "/metrics"  # tells of all tenants


class HttpGate:
    """ASGI middleware. `form`: errors in the form of the API at a path."""

    def __init__(self, app: ASGIApp, gate: Gate, form: Callable[[str], ErrorForm]) -> None:
        self._app = app
        self._gate = gate
        self._form = form

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if scope["type"] == "http" and path not in OPEN_PATHS:
            try:
                caller = self._gate.identify(credentials(Headers(scope=scope)))
                if path == _METRICS:
                    caller.check_role("monitor", "operator")
            except K2Error as error:
                await send_error(send, self._form(path)(error))
                return
        await self._app(scope, receive, send)


def credentials(headers: Headers) -> dict[str, str]:
    """What of a request's headers says who sent it."""
    return {name: headers[name] for name in HEADERS if name in headers}
