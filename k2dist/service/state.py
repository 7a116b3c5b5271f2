"""The cluster's state as the coordinator gathers it: lanes, requests, and the world from its supervisor.

A process that was stopped answers nothing: every question here has a bound of its own, and what was last
heard stands in for what is not.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from msgspec.structs import replace

from k2dist.errors import K2Error
from k2dist.ids import LaneId
from k2dist.messages import LaneLoad
from k2dist.observe import ClusterState, HealthJudge, LaneView, StepPair, WorldState
from k2dist.service.coordinator import Coordinator
from k2dist.service.lane import Lane
from k2dist.service.supervision import Supervision

FRESH_S = 0.25  # asked again so soon, it says the same; dashboards, health checks and pages share a look
_LANE_S = 1.0  # for a lane to answer
_WORLD_S = 2.5  # for the supervisor, which gives its ranks 1 s


class _Heard(NamedTuple):
    lanes: tuple[LaneView, ...]
    world: WorldState | None
    world_error: str
    step: StepPair | None
    at_s: float


class StateWatch:
    """Of one coordinator, on its event loop. Without `supervision` nothing is known of ranks.

    `stall_s`: what has work and stands still for so long is unwell.
    """

    def __init__(
        self,
        cluster: str,
        model: str,
        coordinator: Coordinator[Any],
        supervision: Supervision | None,
        *,
        stall_s: float,
        step_pair: Callable[[Sequence[LaneLoad]], StepPair | None] = lambda loads: None,
    ) -> None:
        self._judge = HealthJudge(stall_s)
        self._cluster = cluster
        self._model = model
        self._coordinator = coordinator
        self._supervision = supervision
        self._step_pair = step_pair
        self._loads: dict[LaneId, LaneLoad] = {}  # the last of each
        self._asking: asyncio.Task[_Heard] | None = None
        self._heard: _Heard | None = None

    async def look(self) -> ClusterState:
        coordinator = self._coordinator
        heard = await self._hear()
        state = ClusterState(
            cluster=self._cluster,
            model=self._model,
            is_draining=coordinator.is_draining,
            num_queued=coordinator.num_queued,
            num_outputs=coordinator.num_outputs,
            lanes=tuple(view for view in heard.lanes if view.lane in coordinator.lanes),
            requests=coordinator.book.facts(),
            world=heard.world,
            world_error=heard.world_error,
            step=heard.step,
        )
        return replace(state, health=self._judge.judge(state, heard.at_s))

    async def _hear(self) -> _Heard:
        """What others say: of this moment, or of `FRESH_S` ago at most."""
        heard = self._heard
        if heard is not None and time.monotonic() - heard.at_s <= FRESH_S:
            return heard
        if self._asking is None or self._asking.done():
            self._asking = asyncio.ensure_future(self._ask())
        return await asyncio.shield(self._asking)  # others may wait for the same

    async def _ask(self) -> _Heard:
        lanes, (world, world_error) = await asyncio.gather(self._look_at_lanes(), self._look_at_world())
        step = self._step_pair([view.load for view in lanes if view.load is not None])
        self._heard = _Heard(lanes, world, world_error, step, time.monotonic())
        return self._heard

    async def _look_at_lanes(self) -> tuple[LaneView, ...]:
        lanes = self._coordinator.lanes
        views = await asyncio.gather(*(self._look_at_lane(lane_id, lane) for lane_id, lane in lanes.items()))
        return tuple(views)

    async def _look_at_lane(self, lane_id: LaneId, lane: Lane) -> LaneView:
        is_silent = False
        try:
            self._loads[lane_id] = await asyncio.wait_for(lane.load(), _LANE_S)
        except (TimeoutError, K2Error):  # its pump finds out what is wrong with it
            is_silent = True
        return LaneView(lane=lane_id, load=self._loads.get(lane_id), is_silent=is_silent)

    async def _look_at_world(self) -> tuple[WorldState | None, str]:
        if self._supervision is None:
            return None, ""
        try:
            return await self._supervision.look(_WORLD_S), ""
        except K2Error as error:
            return None, str(error)
