"""A gateway and a coordinator over lanes of this process, in this event loop, with clients of it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import anthropic
import httpx
import openai

from k2dist.config.cluster import ClusterConfig
from k2dist.service.coordinator_actor import CoordinatorActor
from k2dist.service.gateway_actor import GatewayActor
from tests.service.fake_lane import FakeLane
from tests.service.port_lane import PortLane


@dataclass(frozen=True)
class HttpServer:
    """What runs, and clients of it. No client retries: a test sees what the server said."""

    url: str
    coordinator: CoordinatorActor
    grpc: str
    http: httpx.AsyncClient
    openai: openai.AsyncOpenAI
    anthropic: anthropic.AsyncAnthropic


ServeHttp = Callable[..., AbstractAsyncContextManager[HttpServer]]


@asynccontextmanager
async def run_http(
    config: ClusterConfig, model_dir: Path, *lanes: FakeLane | PortLane
) -> AsyncIterator[HttpServer]:
    coordinator = CoordinatorActor(config, model_dir, lanes)
    gateway = GatewayActor(config)
    grpc = await coordinator.start()
    url = f"http://{await gateway.start(grpc, '127.0.0.1:0')}"
    for lane in lanes:
        lane.start()
    try:
        async with (
            httpx.AsyncClient(base_url=url, timeout=15) as http,
            openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as with_openai,
            anthropic.AsyncAnthropic(base_url=url, api_key="none", max_retries=0) as with_anthropic,
        ):
            yield HttpServer(url, coordinator, grpc, http, with_openai, with_anthropic)
    finally:
        await gateway.stop()
        await coordinator.stop()
        for lane in lanes:
            await lane.stop()
