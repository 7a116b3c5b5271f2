"""`k2dist.v1.Control`: how the cluster stands, each change of it, and draining."""

# ruff: noqa: N802  RPCs are called what the proto calls them

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from contextlib import aclosing
from typing import Any

import grpc

from k2dist._proto.v1 import control_pb2 as pb
from k2dist._proto.v1 import control_pb2_grpc
from k2dist.coordinator import Member, Membership
from k2dist.errors import RequestError
from k2dist.messages import LaneLoad
from k2dist.service.beating import HEARTBEAT_S
from k2dist.service.cluster_watch import ClusterWatch
from k2dist.service.coordinator import Coordinator
from k2dist.service.error_codes import statuses
from k2dist.service.generation import AnswerStyle
from k2dist.service.planning import Planning

Context = grpc.aio.ServicerContext[Any, Any]
# In the supervision table's words. A state that this schema has no name for is UNSPECIFIED.
_RANK_STATES = {name.removeprefix("RANK_STATE_").lower(): state for name, state in pb.RankState.items()}
Drain = Callable[[float | None], Awaitable[bool]]  # timeout_s -> whether it is drained


class ControlServicer(control_pb2_grpc.ControlServicer):
    """See the module. Who may call what is the gate's: `auth`."""

    def __init__(
        self,
        cluster: str,
        model: str,
        coordinator: Coordinator[AnswerStyle],
        watch: ClusterWatch,
        planning: Planning,
        drain: Drain,
    ) -> None:
        self._cluster = cluster
        self._model = model
        self._coordinator = coordinator
        self._watch = watch
        self._planning = planning
        self._drain = drain

    async def GetTopology(self, request: pb.GetTopologyRequest, context: Context) -> pb.GetTopologyResponse:
        async with statuses(context):
            loads = await self._coordinator.loads()
            state = self._watch.feed.state
            return pb.GetTopologyResponse(
                header=self._header(self._watch.feed.revision, state),
                cluster=self._cluster,
                model=self._model,
                state=_service_state(state),
                lanes=map(_write_load, loads),
                queued_requests=self._coordinator.num_queued,
                live_outputs=self._coordinator.num_outputs,
                ranks=_write_ranks(state.ranks),
            )

    async def WatchCluster(self, request: pb.WatchClusterRequest, context: Context) -> None:  # type: ignore[override]
        async with (
            statuses(context),
            aclosing(self._watch.changes(request.start_revision, HEARTBEAT_S)) as changes,
        ):
            async for revision, state in changes:
                header = self._header(revision, state or self._watch.feed.state)
                change = None if state is None else _write_change(state)
                await context.write(pb.WatchClusterResponse(header=header, change=change))

    async def Drain(self, request: pb.DrainRequest, context: Context) -> pb.DrainResponse:
        async with statuses(context):
            timeout_s = request.timeout_s if request.HasField("timeout_s") else None
            if timeout_s is not None and not 0 < timeout_s < float("inf"):
                raise RequestError("timeout_s", f"{timeout_s}: use a number of seconds, or leave it out")
            is_drained = await self._drain(timeout_s)
            return pb.DrainResponse(is_drained=is_drained, live_outputs=self._coordinator.num_outputs)

    async def Plan(self, request: pb.PlanRequest, context: Context) -> pb.PlanResponse:
        async with statuses(context):
            return await self._planning.plan(request)

    def _header(self, revision: int, state: Membership) -> pb.ClusterHeader:
        return pb.ClusterHeader(cluster=self._cluster, generation=state.generation, revision=revision)


def _service_state(state: Membership) -> pb.ServiceState.ValueType:
    return pb.SERVICE_STATE_DRAINING if state.is_draining else pb.SERVICE_STATE_SERVING


def _write_change(state: Membership) -> pb.ClusterChange:
    return pb.ClusterChange(state=_service_state(state), lanes=state.lanes, ranks=_write_ranks(state.ranks))


def _write_ranks(ranks: Iterable[Member]) -> list[pb.RankInfo]:
    return [
        pb.RankInfo(
            world_rank=rank.world_rank,
            state=_RANK_STATES.get(rank.state, pb.RANK_STATE_UNSPECIFIED),
            node=rank.node,
        )
        for rank in ranks
    ]


def _write_load(load: LaneLoad) -> pb.LaneState:
    return pb.LaneState(
        lane=load.lane,
        num_running=load.num_running,
        num_waiting=load.num_waiting,
        num_pages=load.num_pages,
        num_pages_free=load.num_pages_free,
        num_steps=load.num_steps,
    )
