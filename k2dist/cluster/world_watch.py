"""What every rank last said of itself. One that does not answer is asked once, and delays nobody."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from ray.exceptions import RayError

from k2dist.cluster.rank_processes import RankProcesses
from k2dist.cluster.status import RankStatus
from k2dist.cluster.world import World
from k2dist.errors import K2Error
from k2dist.ids import WorldRank
from k2dist.messages import RankStats
from k2dist.observe import RankView

_LOOK_S = 1.0  # for ranks to answer; they do within milliseconds, unless they hang
_ANSWERING = ("ready", "joined", "stopped")  # states in which a rank has stats to give


class WorldWatch:
    """Of one supervisor, on its event loop."""

    def __init__(self, world: World, ranks: RankProcesses) -> None:
        self._world = world
        self._ranks = ranks
        self._stats: dict[WorldRank, RankStats] = {}
        self._asked: dict[WorldRank, tuple[asyncio.Task[RankStats | None], float]] = {}  # and since when

    async def look(self, statuses: Sequence[RankStatus]) -> tuple[RankView, ...]:
        """Every rank of `statuses`, with its newest stats."""
        for status in statuses:
            rank = status.world_rank
            if status.state in _ANSWERING and rank not in self._asked:
                self._asked[rank] = (asyncio.ensure_future(self._ask(rank)), time.monotonic())
        if self._asked:
            await asyncio.wait([task for task, _ in self._asked.values()], timeout=_LOOK_S)
        for rank, (task, _) in tuple(self._asked.items()):
            if task.done():
                del self._asked[rank]
                stats = task.result()
                if stats is not None:
                    self._stats[rank] = stats
        now_s = time.monotonic()
        return tuple(self._view(status, now_s) for status in statuses)

    async def _ask(self, rank: WorldRank) -> RankStats | None:
        try:
            return await self._ranks.ask_stats(rank)
        except (RayError, K2Error):  # it is dead, or dying; whoever awaits its run says so
            return None

    def _view(self, status: RankStatus, now_s: float) -> RankView:
        rank = status.world_rank
        place = self._world.layout.place(rank)
        asked = self._asked.get(rank)
        view = RankView(
            world_rank=rank,
            lane=place.lane,
            tp_rank=place.tp_rank,
            state=status.state,
            node=status.node,
            silent_s=0.0 if asked is None else now_s - asked[1],
        )
        return view.told(self._stats.get(rank))
