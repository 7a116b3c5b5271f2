"""An HTTP server on one address: uvicorn in the event loop it is started in, with bounds set."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Iterator
from functools import partial

import uvicorn
from starlette.types import ASGIApp

from k2dist.config.cluster import split_address
from k2dist.errors import CapacityError, ConfigError, UnavailableError
from k2dist.service.http_connections import WAIT_S, Connection, Listener

_MAX_HEADER_BYTES = 32 * 1024  # of a request that has not come whole; what one read brings may be more
_BACKLOG = 1024
_GRACE_S = 2  # for responses that are still written when it is stopped
_STARTED_S = 0.005  # between two looks whether it serves


class HttpServer:
    """Begins to listen when it is made, so that a port in use is found before all else."""

    def __init__(self, address: str, *, max_connections: int) -> None:
        """CapacityError: the port is taken."""
        self._listener = _listen(address, max_connections)
        self._server: _Server | None = None
        self._serving: asyncio.Task[None] | None = None
        host, port = self._listener.getsockname()[:2]
        self.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    @property
    def is_running(self) -> bool:
        return self._serving is not None and not self._serving.done()

    async def start(self, app: ASGIApp, tls: ssl.SSLContext | None = None) -> None:
        settings = uvicorn.Config(
            app,
            http="h11",  # the parser whose header bound can be set
            ws="none",
            loop="asyncio",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            h11_max_incomplete_event_size=_MAX_HEADER_BYTES,
            timeout_keep_alive=int(WAIT_S) + 1,  # a connection has a deadline of its own
            timeout_graceful_shutdown=_GRACE_S,
        )
        settings.load()
        settings.ssl = tls
        settings.http_protocol_class = partial(Connection, self._listener)  # type: ignore[assignment]
        self._server = _Server(settings)
        self._serving = asyncio.ensure_future(self._server.serve([self._listener]))
        while not self._server.started:
            if self._serving.done():
                self._serving.result()
                raise UnavailableError("the HTTP server ended before it served")
            await asyncio.sleep(_STARTED_S)

    async def stop(self) -> None:
        """Take no more requests, give those under way a moment, and end."""
        if self._server is None or self._serving is None:
            self._listener.close()
            return
        self._server.should_exit = True
        await self._serving


class _Server(uvicorn.Server):
    """Signals are for the process that this one belongs to."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _listen(address: str, max_connections: int) -> Listener:
    parts = split_address(address)
    if parts is None:
        raise ConfigError(f"service.http={address!r}: use host:port, such as 127.0.0.1:8000")
    host, port = parts
    listener = Listener(socket.AF_INET6 if ":" in host else socket.AF_INET, max_connections)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise CapacityError(
            f"service.http: cannot listen on {address} ({error.strerror}); is another server running there? "
            "Stop it, or choose another port"
        ) from error
    listener.setblocking(False)
    return listener
