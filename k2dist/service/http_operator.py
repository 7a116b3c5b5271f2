"""Paths of a gateway for whoever runs the cluster, and for what watches it.

/live         this process answers
/ready        new requests are taken: every rank is there and has tested itself, and nothing drains
/health       steps advance where there is work; red names the rank that the others wait for
/metrics      Prometheus
/v1/cluster   lanes, ranks and counts, as JSON; the page at / draws it
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import Any, Protocol

import msgspec
from fastapi import FastAPI
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from k2dist.errors import K2Error, UnavailableError
from k2dist.observe import ClusterState
from k2dist.service.client import AsyncClient
from k2dist.service.cluster_view import show_cluster
from k2dist.service.http_metrics import HttpMetrics

_LOOK_S = 5.0  # for the coordinator to say how its cluster is


class Watching(Protocol):
    """What these paths need of a gateway."""

    client: AsyncClient
    metrics: HttpMetrics


def add_operator_paths(app: FastAPI, gateway: Watching) -> None:
    async def look() -> ClusterState:
        """UnavailableError: the coordinator does not say so in time."""
        try:
            return await asyncio.wait_for(gateway.client.observe.state(), _LOOK_S)
        except TimeoutError as error:
            raise UnavailableError(f"the coordinator did not answer within {_LOOK_S:g} s") from error

    @app.get("/live")
    async def live() -> Response:
        return JSONResponse({"status": "live"})

    @app.get("/ready")
    async def ready() -> Response:
        try:
            state = await look()
        except K2Error as error:
            return _unwell(str(error))
        if state.health.not_ready:
            return _unwell(state.health.not_ready, late_ranks=state.health.late)
        return JSONResponse({"status": "ready", "lanes": len(state.lanes)})

    @app.get("/health")
    async def health() -> Response:
        try:
            state = await look()
        except K2Error as error:
            return _unwell(str(error))
        if state.health.unwell:
            return _unwell(state.health.unwell, late_ranks=state.health.late)
        loads = [lane.load for lane in state.lanes if lane.load is not None]
        steps = {str(load.lane): load.num_steps for load in loads}
        return JSONResponse({"status": "healthy", "steps": steps})

    @app.get("/metrics")
    async def metrics() -> Response:
        state = None
        with suppress(K2Error):  # what the gateway itself has seen is still true
            state = await look()
        return PlainTextResponse(gateway.metrics.show(state), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/cluster")
    async def cluster() -> Response:
        shown = show_cluster(await look(), time.monotonic())
        headers = {"cache-control": "no-store"}
        return Response(msgspec.json.encode(shown), media_type="application/json", headers=headers)


def _unwell(reason: str, **more: Any) -> Response:
    return JSONResponse({"status": "unwell", "reason": reason} | more, status_code=503)
