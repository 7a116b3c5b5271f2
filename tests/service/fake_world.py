"""A supervisor that says what it was told to say."""

from __future__ import annotations

import asyncio

from k2dist.cluster.status import ClusterStatus
from k2dist.errors import PeerError
from k2dist.messages import CollectiveStats, GroupStats, RankStats
from k2dist.observe import RankView, RecoveryFacts, WorldState


def rank_stats(world_rank: int, *, num_begun: int = 8, waiting_s: float = 0.0) -> RankStats:
    """Of a rank in the middle of its life; `waiting_s`: in the collective under way."""
    calls = CollectiveStats(call="all_to_all_rows", num_calls=num_begun - 1, wait_s_total=0.5)
    group = GroupStats(
        group="world",
        num_begun=num_begun,
        collectives=(calls,),
        under_way="all_to_all_rows" if waiting_s else "",
        waiting_s=waiting_s,
    )
    return RankStats(
        world_rank=world_rank,
        num_steps=40,
        num_tokens_sampled=30,
        step_s_total=4.0,
        host_s_total=1.0,
        device_s_total=3.0,
        num_rows_sent=100 + world_rank,
        num_bytes_sent=5_000,
        num_steps_padded=20,
        num_overflows=2,
        num_masks=7,
        masks_s_total=0.25,
        num_masks_late=1,
        expert_load=((30, 10), (10, 10)) if world_rank == 0 else ((10, 10), (10, 10)),
        groups=(group,),
    )


class FakeWorld:
    """A supervisor of two ranks of one lane, of which nothing changes.

    `late_s`: the other has waited so many seconds for rank 1.
    """

    def __init__(self) -> None:
        self.late_s = 0.0
        self.states = ["joined", "joined"]
        self.is_gone = False

    async def wait(self, revision: int) -> ClusterStatus:
        await asyncio.Event().wait()
        raise AssertionError("nobody sets it")

    async def look(self, timeout_s: float) -> WorldState:
        if self.is_gone:
            raise PeerError("the supervisor died")
        stats = (
            rank_stats(0, waiting_s=self.late_s),
            rank_stats(1, num_begun=7 if self.late_s else 8),
        )
        return WorldState(
            generation=3,
            phase="running",
            ranks=tuple(
                RankView(world_rank=rank, lane=0, tp_rank=rank, state=self.states[rank], node="n").told(
                    stats[rank]
                )
                for rank in range(2)
            ),
            recoveries=RecoveryFacts(num_recoveries=2, total_s=9.5, last_s=4.0),
        )
