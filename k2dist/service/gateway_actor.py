"""The gateway as a process: a gRPC client of the coordinator behind an HTTP server.

A plain class with async methods, as `CoordinatorActor` is; `cluster` makes a Ray actor of it. It is a process
of its own, beside the coordinator: parsing JSON and writing SSE for many clients then takes nothing from the
event loop that the lanes' events go through, and if it dies nothing is lost, as it holds nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import uvicorn

from k2dist.config.cluster import ClusterConfig, split_address
from k2dist.errors import CapacityError, ConfigError, UnavailableError
from k2dist.service.client import AsyncClient
from k2dist.service.http_app import Gateway, make_app

_MAX_HEADER_BYTES = 32 * 1024
_BACKLOG = 1024
_GRACE_S = 2  # for responses that are still written when it is stopped


class GatewayActor:
    """`start` before all else, on the event loop that then belongs to it."""

    def __init__(self, config: ClusterConfig) -> None:
        self._config = config
        self._address = ""
        self._client: AsyncClient | None = None
        self._server: _Server | None = None
        self._serving: asyncio.Task[None] | None = None

    async def start(self, coordinator: str, http: str) -> str:
        """Serve the coordinator on `http`, and return where. CapacityError: the port is taken."""
        listener = _listen(http)
        self._client = AsyncClient(coordinator)
        (model,) = await self._client.models()
        gateway = Gateway(
            self._client, model.name, max_running=max_running(self._config), stall_s=stall_s(self._config)
        )
        settings = uvicorn.Config(
            make_app(gateway),
            http="h11",  # the parser whose header bound can be set
            ws="none",
            loop="asyncio",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            h11_max_incomplete_event_size=_MAX_HEADER_BYTES,
            timeout_graceful_shutdown=_GRACE_S,
        )
        self._server = _Server(settings)
        self._serving = asyncio.ensure_future(self._server.serve([listener]))
        host, port = listener.getsockname()[:2]
        self._address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        while not self._server.started:
            if self._serving.done():
                self._serving.result()
                raise UnavailableError("the HTTP server ended before it served")
            await asyncio.sleep(0.005)
        return self._address

    async def address(self) -> str:
        if self._serving is None or self._serving.done():
            raise UnavailableError("the gateway is not running")
        return self._address

    async def stop(self) -> None:
        """Take no more requests, give those under way a moment, and end."""
        if self._server is not None and self._serving is not None:
            self._server.should_exit = True
            await self._serving
            self._server = self._serving = None
        if self._client is not None:
            await self._client.close()
            self._client = None


def max_running(config: ClusterConfig) -> int:
    """As many requests as the coordinator queues and the lanes run; more could only wait."""
    return config.service.max_queued + config.parallel.lanes * config.scheduler.max_running


def stall_s(config: ClusterConfig) -> float:
    """A step that takes longer than its deadline has failed; twice that is no step at all."""
    return 2 * config.deadlines.step_s


class _Server(uvicorn.Server):
    """Signals are for the process that this one belongs to."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _listen(address: str) -> socket.socket:
    parts = split_address(address)
    if parts is None:
        raise ConfigError(f"service.http={address!r}: use host:port, such as 127.0.0.1:8000")
    host, port = parts
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
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
