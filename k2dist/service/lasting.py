"""An answer that outlives its connection: read on after each loss, with nothing lost and nothing doubled.

    Generate(detached, own id) ──events──> ✂ ... Resume ──Splice──> events ... ──> end, or Abort by who leaves

The request is detached, because else the server would end it with the connection. So a process that is killed
while it reads leaves its request to run to its end.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from typing import Any, Protocol

from msgspec.structs import replace

from k2dist.errors import K2Error, UnavailableError
from k2dist.service.answer_events import AnswerEvent
from k2dist.service.client_request import ClientRequest
from k2dist.service.splice import Splice

_PAUSE_S = 0.2  # before each try


class Reading(Protocol):
    """What an `AsyncClient` offers."""

    def generate(self, request: ClientRequest) -> AsyncGenerator[AnswerEvent]: ...

    def resume(self, request_id: str) -> AsyncGenerator[AnswerEvent]: ...

    async def abort(self, request_id: str) -> Any: ...


async def generate_lasting(
    client: Reading, request: ClientRequest, *, reconnect_s: float
) -> AsyncGenerator[AnswerEvent]:
    """`client.generate` that goes on after a lost connection, unless nobody answers for `reconnect_s`.

    UnavailableError: then. UnknownRequestError: the server came back without this request.
    """
    request_id = request.request_id or str(uuid.uuid4())
    request = replace(request, request_id=request_id, detached=True)
    loop, splice = asyncio.get_running_loop(), Splice()
    lost_s: float | None = None
    try:
        while not splice.has_ended:
            # Before it was accepted it is sent as it was: the same id with the same content is no second
            # request.
            is_begun = splice.accepted is not None
            events = client.resume(request_id) if is_begun else client.generate(request)
            try:
                async with aclosing(events):
                    async for event in events:
                        lost_s = None
                        fresh = splice.push(event)
                        if fresh is not None:
                            yield fresh
            except UnavailableError:
                lost_s = loop.time() if lost_s is None else lost_s
                if loop.time() - lost_s >= reconnect_s:
                    raise
                await asyncio.sleep(_PAUSE_S)
            splice.again()
    finally:
        if not splice.has_ended:
            with suppress(K2Error):  # a server that is not there does not run it either
                await client.abort(request_id)
