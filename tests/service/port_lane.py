"""A lane of a `LocalWorld`, as a coordinator in the same process reaches it."""

from __future__ import annotations

import asyncio

from k2dist.engine import LanePort
from k2dist.ids import RequestId
from k2dist.messages import AdmitReply, EventBatch, LaneLoad, LiveRequest, Request


class PortLane:
    """What `service.Lane` asks for. Who opened the world closes it."""

    def __init__(self, port: LanePort) -> None:
        self._port = port

    async def admit(self, requests: tuple[Request, ...]) -> tuple[AdmitReply, ...]:
        return await asyncio.to_thread(self._port.admit, requests)

    async def cancel(self, ids: tuple[RequestId, ...]) -> None:
        self._port.cancel(ids)

    async def events(self, after: int) -> EventBatch:
        return await asyncio.to_thread(self._port.events, after, 0.2)

    async def live(self) -> tuple[LiveRequest, ...]:
        return self._port.live()

    async def load(self) -> LaneLoad:
        return self._port.load()

    async def drain(self) -> None:
        self._port.drain()

    def start(self) -> None:
        """Nothing: the world runs."""

    async def stop(self) -> None:
        """Nothing: the world is closed by its owner."""
