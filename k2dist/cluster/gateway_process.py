"""The HTTP gateway as its supervisor sees it: made early, opened behind the coordinator, kept up, closed.

It holds nothing that outlives a request, so one that dies is made anew, on the same address; the cluster goes
on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any, Protocol

import ray

from k2dist.cluster.answers import answer
from k2dist.cluster.placement import detached_here
from k2dist.cluster.world import World
from k2dist.config.cluster import ClusterConfig
from k2dist.errors import K2Error
from k2dist.observe.event_log import EventLog

NAME = "gateway"
_WATCH_S = 1.0  # a dead gateway is noticed within this, and tried again so often
_CLOSE_S = 5.0  # for responses that are still written; then it is killed
_log = EventLog(logging.getLogger(__name__))


class Gateway(Protocol):
    """What the class that runs in the gateway's process offers: `service.GatewayActor`."""

    def __init__(self, config: ClusterConfig, inner_key: str) -> None: ...

    async def enter_process(self) -> None:
        """Called first, where it is a process of its own."""
        ...

    async def start(self, coordinator: str, http: str) -> str:
        """Listen for clients; returns the address."""
        ...

    async def address(self) -> str: ...

    async def stop(self) -> None: ...


class GatewayProcess:
    """Of one cluster. Without `service.http` there is none, and nothing here does anything."""

    def __init__(self, world: World, gateway: type[Gateway], inner_key: str) -> None:
        self._world = world
        self._inner_key = inner_key
        self._gateway = gateway
        self._wanted = world.config.service.http
        self._actor: Any = None

    def create(self) -> None:
        """Start the process; it listens to nobody yet."""
        if self._wanted is not None:
            self._actor = (
                ray.remote(self._gateway)
                .options(**detached_here(NAME))
                .remote(self._world.config, self._inner_key)
            )
            self._actor.enter_process.remote()

    async def open(self, coordinator: str) -> str:
        """The address it now listens on, or "". Errors: CapacityError (port in use), PeerError."""
        if self._wanted is None:
            return ""
        start_s = self._world.config.deadlines.start_s
        opened = self._actor.start.remote(coordinator, self._wanted)
        self._wanted = await answer(opened, start_s, "the gateway")  # the same one from now on
        return self._wanted

    async def keep(self, coordinator: str) -> None:
        """Make it anew whenever it has died or hangs, until this is cancelled."""
        while self._wanted is not None:
            await asyncio.sleep(_WATCH_S)
            try:
                call_s = self._world.config.deadlines.call_s
                await answer(self._actor.address.remote(), call_s, "the gateway")
            except K2Error as error:
                _log.error("gateway.lost", error=str(error))
                ray.kill(self._actor, no_restart=True)
                await self._open_again(coordinator)

    async def _open_again(self, coordinator: str) -> None:
        try:
            self.create()
            await self.open(coordinator)
        except (K2Error, ValueError) as error:  # Ray's ValueError: the name is not free yet; next time
            _log.error("gateway.not_opened", error=str(error))

    async def close(self) -> None:
        """Let it finish what it writes, then end the process."""
        if self._actor is None:
            return
        actor, self._actor, self._wanted = self._actor, None, None
        with contextlib.suppress(K2Error):
            await answer(actor.stop.remote(), _CLOSE_S, "the gateway")
        ray.kill(actor, no_restart=True)
