"""What `/v1/cluster` shows of a cluster's state: enough for a page or a script, nothing of single tenants."""

from __future__ import annotations

from k2dist.messages import Message
from k2dist.observe import ClusterState, LaneView, RankView


class LaneShown(Message, frozen=True, kw_only=True):
    lane: int
    ranks: tuple[int, ...]
    is_silent: bool
    running: int = 0  # outputs that hold pages
    waiting: int = 0
    pages: int = 0
    pages_used: int = 0
    steps: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0  # of outputs that began to run
    cached_tokens: int = 0  # of these, found in the cache


class RankShown(Message, frozen=True, kw_only=True):
    rank: int
    lane: int | None
    tp_rank: int | None
    state: str
    node: str
    is_late: bool
    silent_s: float
    steps: int = 0
    busy_s: float = 0.0  # in steps
    rows_sent: int = 0  # to other ranks' experts
    wait_s: float = 0.0  # in collectives
    expert_rows: tuple[int, ...] = ()  # by MoE layer: rows that its experts computed


class ClusterShown(Message, frozen=True, kw_only=True):
    """Counts are since the start: subtract two answers, and divide by the time between their `at_s`."""

    cluster: str
    model: str
    at_s: float  # a steady clock of the server
    generation: int | None
    phase: str | None
    not_ready: str  # why; empty when it is
    unwell: str
    queued: int
    prompt_tokens: int
    generated_tokens: int
    recoveries: int
    lanes: tuple[LaneShown, ...]
    ranks: tuple[RankShown, ...]


def show_cluster(state: ClusterState, now_s: float) -> ClusterShown:
    world, tenants = state.world, state.requests.tenants
    ranks = () if world is None else world.ranks
    return ClusterShown(
        cluster=state.cluster,
        model=state.model,
        at_s=now_s,
        generation=None if world is None else world.generation,
        phase=None if world is None else world.phase,
        not_ready=state.health.not_ready,
        unwell=state.health.unwell,
        queued=state.num_queued,
        prompt_tokens=sum(tenant.num_prompt_tokens for tenant in tenants),
        generated_tokens=sum(tenant.num_generated_tokens for tenant in tenants),
        recoveries=0 if world is None else world.recoveries.num_recoveries,
        lanes=tuple(_lane(lane, ranks) for lane in state.lanes),
        ranks=tuple(_rank(rank, state.health.late) for rank in ranks),
    )


def _lane(view: LaneView, ranks: tuple[RankView, ...]) -> LaneShown:
    members = tuple(rank.world_rank for rank in ranks if rank.lane == view.lane)
    load = view.load
    if load is None:
        return LaneShown(lane=view.lane, ranks=members, is_silent=view.is_silent)
    return LaneShown(
        lane=view.lane,
        ranks=members,
        is_silent=view.is_silent,
        running=load.num_running,
        waiting=load.num_waiting,
        pages=load.num_pages,
        pages_used=load.num_pages - load.num_pages_free,
        steps=load.num_steps,
        preemptions=load.num_preemptions,
        prompt_tokens=load.num_prompt_tokens,
        cached_tokens=load.num_cached_tokens,
    )


def _rank(view: RankView, late: tuple[int, ...]) -> RankShown:
    stats = view.stats
    waits = () if stats is None else (call for group in stats.groups for call in group.collectives)
    return RankShown(
        rank=view.world_rank,
        lane=view.lane,
        tp_rank=view.tp_rank,
        state=view.state,
        node=view.node,
        is_late=view.world_rank in late,
        silent_s=view.silent_s,
        steps=0 if stats is None else stats.num_steps,
        busy_s=0.0 if stats is None else stats.step_s_total,
        rows_sent=0 if stats is None else stats.num_rows_sent,
        wait_s=sum(call.wait_s_total for call in waits),
        expert_rows=tuple(layer.num_rows for layer in view.layers),
    )
