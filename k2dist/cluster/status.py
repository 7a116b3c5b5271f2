"""A running cluster as its supervisor reports it."""

from __future__ import annotations

from k2dist.ids import Generation, WorldRank
from k2dist.messages import Message, RankProgress


class RankStatus(Message, frozen=True, kw_only=True):
    """One rank: its state in the supervision table, and how far its load is."""

    world_rank: WorldRank
    state: str
    node: str = ""  # address of its node, once it has a process
    pid: int = 0
    progress: RankProgress = RankProgress()


class ClusterStatus(Message, frozen=True, kw_only=True):
    """`revision` grows with every change. `address` is where the service listens, and `http`
    where its gateway does, empty while it does not."""

    revision: int
    phase: str
    generation: Generation
    ranks: tuple[RankStatus, ...]
    address: str = ""
    http: str = ""
    reason: str = ""  # why it ends, once it does
    is_failure: bool = False  # it ends for another reason than a request to

    @property
    def has_ended(self) -> bool:
        return self.phase == "stopped"
