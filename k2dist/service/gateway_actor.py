"""The gateway as a process: a gRPC client of the coordinator behind an HTTP server.

A plain class with async methods, as `CoordinatorActor` is; `cluster` makes a Ray actor of it. It is a process
of its own, beside the coordinator: parsing JSON and writing SSE for many clients then takes nothing from the
event loop that the lanes' events go through, and if it dies nothing is lost, as it holds nothing.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from k2dist.config.cluster import ClusterConfig
from k2dist.errors import UnavailableError
from k2dist.observe.event_log import set_up_logs
from k2dist.service.auth import Gate
from k2dist.service.bounds import max_requests
from k2dist.service.client import AsyncClient
from k2dist.service.spans import open_spans
from k2dist.service.tls import inner_tls, server_context

if TYPE_CHECKING:
    from k2dist.service.http_server import HttpServer

_MORE_CONNECTIONS = 1024  # than requests that generate: those of pools and probes, and those that are refused


class GatewayActor:
    """`start` before all else, on the event loop that then belongs to it. inner_key: by which the coordinator
    knows it, where there are API keys."""

    def __init__(self, config: ClusterConfig, inner_key: str = "") -> None:
        # Now, while the ranks load. Not with the module: the command line names this class, and no more.
        from k2dist.service import http_app, http_server

        self._app, self._http = http_app, http_server
        self._config = config
        self._inner_key = inner_key
        self._client: AsyncClient | None = None
        observe = config.observe
        self._spans = open_spans("gateway", config.name, observe.otlp_endpoint, observe.trace_share)
        self._server: HttpServer | None = None

    async def enter_process(self) -> None:
        """It is a process of its own: let it log as the config says."""
        set_up_logs(self._config.observe.log_level, self._config.observe.log_format, process="gateway")

    async def start(self, coordinator: str, http: str) -> str:
        """Serve the coordinator on `http`, and return where. CapacityError: the port is taken. ConfigError: a
        file of `service` cannot be read."""
        service = self._config.service
        gate = Gate(service.api_keys)
        context = server_context(service.tls) if service.tls.is_on else None
        num_running = max_requests(self._config)
        self._server = self._http.HttpServer(http, max_connections=num_running + _MORE_CONNECTIONS)
        self._client = AsyncClient(coordinator, tls=inner_tls(service.tls), api_key=self._inner_key)
        (model,) = await self._client.models()
        gateway = self._app.Gateway(
            self._client, model.name, gate, max_running=num_running, spans=self._spans
        )
        await self._server.start(self._app.make_app(gateway), context)
        return self._server.address

    async def address(self) -> str:
        if self._server is None or not self._server.is_running:
            raise UnavailableError("the gateway is not running")
        return self._server.address

    async def stop(self) -> None:
        """Take no more requests, give those under way a moment, and end."""
        if self._server is not None:
            await self._server.stop()
            self._server = None
        if self._client is not None:
            await self._client.close()
            self._client = None
        await asyncio.to_thread(self._spans.close)
