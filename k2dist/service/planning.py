"""The planner behind the service: the RPC `Plan`, and the estimate beside what is measured."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

import msgspec
from msgspec.structs import replace

from k2dist._proto.v1 import control_pb2
from k2dist.config import Architecture
from k2dist.config.cluster import ClusterConfig
from k2dist.config.load import parse_cluster
from k2dist.errors import RequestError
from k2dist.messages import LaneLoad
from k2dist.observe import StepPair
from k2dist.parallel import configured_layout
from k2dist.planner import ClusterPlan, StepModel, Workload, fitting_workload, plan_cluster
from k2dist.planner.beside import Beside
from k2dist.planner.site import configured_site


class Planning:
    """Of the cluster that serves `architecture`, called `model`."""

    def __init__(
        self,
        config: ClusterConfig,
        model: str,
        architecture: Architecture,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._model = model
        self._architecture = architecture
        self._clock = clock
        site = configured_site(config, architecture, configured_layout(architecture, config.parallel))
        self._beside = Beside(StepModel(site), config.cache.page_tokens)

    async def plan(self, request: control_pb2.PlanRequest) -> control_pb2.PlanResponse:
        """Errors as `plan_cluster`. In a thread: a large cluster takes half a second."""
        planned = await asyncio.to_thread(self._plan, request)
        return control_pb2.PlanResponse(json=msgspec.json.encode(planned))

    def step_pair(self, loads: Sequence[LaneLoad]) -> StepPair | None:
        """Of the steps since the last call."""
        return self._beside.note(loads, self._clock())

    def _plan(self, request: control_pb2.PlanRequest) -> ClusterPlan:
        config = parse_cluster(request.config, "config") if request.config else self._config
        workload = _workload(request)
        if not request.HasField("prompt_len") and not request.HasField("output_len"):
            workload = fitting_workload(config, self._architecture, workload)
        return plan_cluster(config, self._model, self._architecture, workload)


def _workload(request: control_pb2.PlanRequest) -> Workload:
    given = {
        name: getattr(request, name)
        for name in ("prompt_len", "output_len", "concurrency", "target_tpot_s")
        if request.HasField(name)
    }
    for name, value in given.items():
        if not value > 0:
            raise RequestError(name, f"{value}: use more than 0")
    return replace(Workload(), **given)
