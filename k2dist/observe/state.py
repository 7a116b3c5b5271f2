"""All that a cluster says of itself at one moment: what metrics, health checks and the page are made of.

    WorldState     of the supervisor: ranks, what each has counted, recoveries
    ClusterState   of the coordinator: lanes, requests, and the world if its supervisor answers

Counts are since the start of the process that counts; whoever wants a rate subtracts.
"""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from k2dist.messages import LaneLoad, Message, RankStats
from k2dist.observe.recoveries import RecoveryFacts
from k2dist.observe.requests import RequestFacts


class RankView(Message, frozen=True, kw_only=True):
    """One rank. `stats` are the last it gave (`expert_load` is left out: `layers` sum it up)."""

    world_rank: int
    lane: int | None
    tp_rank: int | None
    state: str  # in the supervision table
    node: str = ""
    silent_s: float = 0.0  # asked so long ago, and no answer; 0: it has answered
    stats: RankStats | None = None
    layers: tuple[LayerLoad, ...] = ()

    def told(self, stats: RankStats | None) -> RankView:
        """The same rank with the stats that it gave; None: it gave none."""
        if stats is None:
            return self
        layers = tuple(map(_layer, stats.expert_load))
        return replace(self, stats=replace(stats, expert_load=()), layers=layers)


class LayerLoad(Message, frozen=True, kw_only=True):
    """What one rank's experts of one MoE layer have computed, in rows."""

    num_rows: int
    num_rows_peak: int  # of its busiest slot
    num_slots: int


class WorldState(Message, frozen=True, kw_only=True):
    generation: int
    phase: str
    ranks: tuple[RankView, ...]  # in rank order
    recoveries: RecoveryFacts = RecoveryFacts()


class LaneView(Message, frozen=True, kw_only=True):
    """`load` is the last it gave; None: it never answered."""

    lane: int
    load: LaneLoad | None
    is_silent: bool = False  # it did not answer just now


class StepPair(Message, frozen=True, kw_only=True):
    """One step of all lanes as planned and as it was. Tokens a second: of all lanes, if each running sequence
    gets one a step."""

    estimated_step_s: float
    measured_step_s: float
    estimated_tokens_per_s: float
    measured_tokens_per_s: float


class Health(Message, frozen=True, kw_only=True):
    """Why it is not ready, and why it is unwell; empty where it is. `late`: world ranks that are to blame."""

    not_ready: str = ""
    unwell: str = ""
    late: tuple[int, ...] = ()


class ClusterState(Message, frozen=True, kw_only=True):
    cluster: str
    model: str
    is_draining: bool
    num_queued: int  # requests that no lane has taken yet
    num_outputs: int  # under way in all lanes
    lanes: tuple[LaneView, ...]  # those that live
    requests: RequestFacts
    world: WorldState | None = None  # None: there is no supervisor, or it does not answer
    world_error: str = ""  # why there is none
    step: StepPair | None = None  # of the steps since somebody last asked; None while nothing runs
    health: Health = Health()


def _layer(rows_by_slot: Sequence[int]) -> LayerLoad:
    return LayerLoad(
        num_rows=sum(rows_by_slot), num_rows_peak=max(rows_by_slot, default=0), num_slots=len(rows_by_slot)
    )
