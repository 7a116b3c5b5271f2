"""A lane across a process border: calls to the actor of its first rank, each awaited within a deadline.

What a `service.Lane` is; the coordinator is handed these and never learns of Ray.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any, TypeVar

from ray.exceptions import RayActorError, RayTaskError

from k2dist.errors import K2Error, PeerError
from k2dist.ids import LaneId, RequestId, WorldRank
from k2dist.messages import AdmitReply, EventBatch, LaneLoad, LiveRequest, Request

T = TypeVar("T")

POLL_S = 5.0  # how long `events` waits for the first one


class LaneHandle:
    """One lane. `actor` hosts `world_rank`, its first rank. Every method may raise PeerError, after `call_s`
    at the latest; `events` after `POLL_S` more."""

    def __init__(self, lane: LaneId, world_rank: WorldRank, actor: Any, *, call_s: float) -> None:
        self.lane = lane
        self._world_rank = world_rank
        self._actor = actor
        self._call_s = call_s

    async def admit(self, requests: tuple[Request, ...]) -> tuple[AdmitReply, ...]:
        return await self._answer("admit", self._actor.admit.remote(requests))

    async def cancel(self, ids: tuple[RequestId, ...]) -> None:
        await self._answer("cancel", self._actor.cancel.remote(ids))

    async def events(self, after: int) -> EventBatch:
        return await self._answer("events", self._actor.events.remote(after, POLL_S), POLL_S)

    async def live(self) -> tuple[LiveRequest, ...]:
        return await self._answer("live", self._actor.live.remote())

    async def load(self) -> LaneLoad:
        return await self._answer("load", self._actor.lane_load.remote())

    async def drain(self) -> None:
        await self._answer("drain", self._actor.drain.remote())

    async def _answer(self, call: str, ref: Awaitable[T], more_s: float = 0.0) -> T:
        who = f"lane {self.lane} (world rank {self._world_rank})"
        try:
            return await asyncio.wait_for(ref, self._call_s + more_s)
        except TimeoutError as error:
            message = f"{who} did not answer {call} within deadlines.call_s={self._call_s:g}"
            raise PeerError(message, (self._world_rank,)) from error
        except RayActorError as error:
            raise PeerError(f"{who} died", (self._world_rank,)) from error
        except RayTaskError as error:
            if isinstance(error.cause, K2Error):
                raise error.cause from None
            raise
