"""The coordinator as its supervisor sees it: made early, opened when every rank steps, drained, closed.

`cluster` does not import `service`: the class comes from whoever starts the cluster.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Any, Protocol

import ray

from k2dist.cluster.answers import answer
from k2dist.cluster.lane_handle import LaneHandle
from k2dist.cluster.placement import detached_here
from k2dist.cluster.supervisor_handle import SupervisorHandle
from k2dist.cluster.world import World
from k2dist.config.cluster import ClusterConfig
from k2dist.errors import K2Error

NAME = "coordinator"
_WHO = "the coordinator"
_WATCH_S = 1.0  # a dead coordinator is noticed within this
_CLOSE_S = 2.0  # for ending open streams with a status; then it is killed


class Service(Protocol):
    """What the class that runs in the coordinator's process offers: `service.CoordinatorActor`."""

    def __init__(
        self,
        config: ClusterConfig,
        model_dir: str,
        lanes: Sequence[LaneHandle],
        *,
        inner_key: str,
        supervision: SupervisorHandle,
    ) -> None: ...

    async def enter_process(self) -> None:
        """Called first, where it is a process of its own."""
        ...

    async def start(self) -> str:
        """Listen for clients; returns the address."""
        ...

    async def address(self) -> str: ...

    async def drain(self, timeout_s: float) -> bool:
        """Take no new requests; true once none is left, false after `timeout_s`."""
        ...

    async def stop(self) -> None: ...


class ServiceProcess:
    """One coordinator actor, which needs no resources of Ray's count."""

    def __init__(self, world: World, service: type[Service], inner_key: str) -> None:
        self._world = world
        self._inner_key = inner_key
        self._service = service
        self._actor: Any = None

    def create(self, lanes: Sequence[LaneHandle], supervision: SupervisorHandle) -> None:
        """Start the process; it listens to nobody yet."""
        self._actor = (
            ray.remote(self._service)
            .options(**detached_here(NAME))
            .remote(
                self._world.config,
                self._world.model_dir,
                lanes,
                inner_key=self._inner_key,
                supervision=supervision,
            )
        )
        self._actor.enter_process.remote()

    async def open(self) -> str:
        """The address it now listens on. Errors: CapacityError (port in use), PeerError."""
        opened = self._actor.start.remote()
        address: str = await answer(opened, self._world.config.deadlines.start_s, _WHO)
        return address

    async def watch(self) -> K2Error:
        """Return when it has died or hangs, with the reason."""
        while True:
            try:
                await answer(self._actor.address.remote(), self._world.config.deadlines.call_s, _WHO)
            except K2Error as error:
                return error
            await asyncio.sleep(_WATCH_S)

    async def drain(self, timeout_s: float) -> None:
        """Wait until no accepted request is left, or `timeout_s`; a coordinator that is gone has none."""
        with contextlib.suppress(K2Error):
            more_s = self._world.config.deadlines.call_s
            await answer(self._actor.drain.remote(timeout_s), timeout_s + more_s, _WHO)

    async def close(self) -> None:
        """End streams that are open, then the process."""
        if self._actor is None:
            return
        with contextlib.suppress(K2Error):
            await answer(self._actor.stop.remote(), _CLOSE_S, _WHO)
        ray.kill(self._actor, no_restart=True)
