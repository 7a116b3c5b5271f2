"""A lane as the coordinator sees it: `engine.LanePort` across a process border, every call awaited.

`cluster.lane_handle` implements it over Ray; the coordinator is handed its lanes and never learns how they
are reached.
"""

from __future__ import annotations

from typing import Protocol

from k2dist.ids import RequestId
from k2dist.messages import AdmitReply, EventBatch, LaneLoad, LiveRequest, Request


class Lane(Protocol):
    """One lane. Every method raises PeerError when the lane has died or does not answer in time."""

    async def admit(self, requests: tuple[Request, ...]) -> tuple[AdmitReply, ...]:
        """Hand over requests; one reply each, in order. Without an error in it the lane has it."""

    async def cancel(self, ids: tuple[RequestId, ...]) -> None:
        """End these before the lane plans its next step; unknown and ended ones are left alone."""

    async def events(self, after: int) -> EventBatch:
        """The lane's events from number `after` on, waiting some seconds for the first; may return none.

        `after` acknowledges all events before it: the lane may forget them.
        """

    async def live(self) -> tuple[LiveRequest, ...]:
        """Every request the lane knows, ended ones until `retain_s` after their end."""

    async def load(self) -> LaneLoad: ...

    async def drain(self) -> None:
        """Take no new requests; those admitted go on."""
