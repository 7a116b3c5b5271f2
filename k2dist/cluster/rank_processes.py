"""The rank actors as the supervisor sees them: each call to one becomes the event that it ends in."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup

from k2dist.cluster.lane_handle import LaneHandle
from k2dist.cluster.placement import bundle_of
from k2dist.cluster.rank_actor import THREADS, RankActor, RankProcess
from k2dist.cluster.world import Rendezvous, World
from k2dist.ids import LaneId, WorldRank
from k2dist.messages import RankProgress, RankStats
from k2dist.supervision.events import (
    Died,
    Failed,
    Joined,
    JoinGeneration,
    Loaded,
    LoadRank,
    OfProcess,
    RunRank,
    Started,
    StartRank,
    Stopped,
)


class RankProcesses:
    """The living incarnation of each rank. Methods that return an event wait for it, and never raise."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._actors: dict[WorldRank, Any] = {}
        self.processes: dict[WorldRank, RankProcess] = {}
        self.progress: dict[WorldRank, RankProgress] = {}

    def create(self, action: StartRank, group: PlacementGroup) -> None:
        """Ask for the actor; its handle can be used at once."""
        ranks = self._world.config.ranks
        self._actors[action.world_rank] = (
            ray.remote(concurrency_groups=THREADS)(RankActor)
            .options(
                name=f"rank-{action.world_rank}.{action.incarnation}",
                lifetime="detached",
                max_restarts=0,
                num_cpus=ranks.rank_cpus,
                num_gpus=ranks.rank_gpus,
                scheduling_strategy=bundle_of(group, self._world, action.world_rank),
            )
            .remote(self._world, action.world_rank)
        )

    async def start(self, action: StartRank) -> Started | Failed | Died:
        actor = self._actors[action.world_rank]
        try:
            self.processes[action.world_rank] = await actor.process.remote()
        except RayError as error:
            return _trouble(action, error)
        return Started(action.world_rank, action.incarnation)

    async def load(self, action: LoadRank) -> Loaded | Failed | Died:
        try:
            await self._actors[action.world_rank].load.remote()
            await self.ask_progress(action.world_rank)  # the last word, however fast it was
        except RayError as error:
            return _trouble(action, error)
        return Loaded(action.world_rank, action.incarnation)

    async def join(self, action: JoinGeneration, meeting: Rendezvous) -> Joined | Failed | Died:
        try:
            await self._actors[action.world_rank].join.remote(meeting, self._in_order())
            await self.ask_progress(action.world_rank)  # how long it took to record its steps
        except RayError as error:
            return _trouble(action, error)
        return Joined(action.world_rank, action.incarnation, action.generation)

    async def run(self, action: RunRank) -> Stopped | Failed | Died:
        try:
            await self._actors[action.world_rank].run.remote()
        except RayError as error:
            return _trouble(action, error)
        return Stopped(action.world_rank, action.incarnation)

    async def ask_progress(self, world_rank: WorldRank) -> None:
        """Look how far its load is. A rank that cannot say is dealt with by whoever awaits its load."""
        try:
            self.progress[world_rank] = await self._actors[world_rank].progress.remote()
        except RayError:
            return

    async def stats(self) -> tuple[RankStats, ...]:
        """Of every rank, in rank order."""
        refs = [actor.stats.remote() for actor in self._in_order()]
        return tuple([await ref for ref in refs])

    def ask_stats(self, world_rank: WorldRank) -> Awaitable[RankStats]:
        """Of one rank, for whoever can wait for it, or not. RayError: it died."""
        answer: Awaitable[RankStats] = self._actors[world_rank].stats.remote()
        return answer

    def stop(self, world_rank: WorldRank) -> None:
        """Tell it to leave its loop; `run` then ends."""
        self._actors[world_rank].stop.remote()

    def kill(self, world_rank: WorldRank) -> None:
        ray.kill(self._actors[world_rank], no_restart=True)

    def lanes(self) -> tuple[LaneHandle, ...]:
        call_s = self._world.config.deadlines.call_s
        return tuple(
            LaneHandle(LaneId(lane), world_rank, self._actors[world_rank], call_s=call_s)
            for lane, world_rank in enumerate(self._world.first_ranks())
        )

    def _in_order(self) -> list[Any]:
        return [self._actors[place.world_rank] for place in self._world.layout.ranks]


def _trouble(action: OfProcess, error: RayError) -> Failed | Died:
    kind = Died if isinstance(error, RayActorError) else Failed
    return kind(action.world_rank, action.incarnation, _why(error))


def _why(error: RayError) -> str:
    """One line. Ray's own messages are paragraphs, with the cause in the middle."""
    if isinstance(error, RayTaskError):
        return _one_line(f"{type(error.cause).__name__}: {error.cause}")
    text = str(error)
    if "creation task" in text:  # RankActor's constructor raised; the last line is what
        return _one_line(text.strip().rpartition("\n")[2])
    return "its process is gone: killed, out of memory, or crashed"


def _one_line(text: str) -> str:
    return " ".join(text.split())
