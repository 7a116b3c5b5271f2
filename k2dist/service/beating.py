"""A gRPC stream that is never silent for long: what it is given, and a heartbeat where that is nothing."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Any, Self

import grpc

HEARTBEAT_S = 10.0  # load balancers cut streams that are silent for 60 s, some for 15


class BeatingStream:
    """Writes messages to a call, each when the one before has left. One task a stream, which mostly sleeps:
    to wait for each event with a timeout of its own would cost a task an event."""

    def __init__(self, context: grpc.aio.ServicerContext[Any, Any], heartbeat: Any) -> None:
        self._context = context
        self._heartbeat = heartbeat
        self._writing = asyncio.Lock()
        self._loop = asyncio.get_running_loop()
        self._last_s = self._loop.time()
        self._beating: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._beating = self._loop.create_task(self._beat())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._beating is not None
        self._beating.cancel()
        await asyncio.gather(self._beating, return_exceptions=True)

    async def write(self, message: Any) -> None:
        async with self._writing:
            await self._context.write(message)
            self._last_s = self._loop.time()

    async def _beat(self) -> None:
        while True:
            silent_s = self._loop.time() - self._last_s
            if silent_s < HEARTBEAT_S:
                await asyncio.sleep(HEARTBEAT_S - silent_s)
            elif self._writing.locked():  # its reader is slow: the line is not silent
                await asyncio.sleep(HEARTBEAT_S)
            else:
                await self.write(self._heartbeat)
