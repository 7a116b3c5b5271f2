"""Experts to slots: the first layout by formula, and which copy of an expert a rank sends its rows to."""

from __future__ import annotations

from k2dist.config.architecture import Architecture
from k2dist.config.cluster import ParallelConfig
from k2dist.errors import LayoutError
from k2dist.ids import ExpertId, LaneId, SlotId, TpRank, WorldRank
from k2dist.parallel.layout import Layout, RankPlace, check_layout


def configured_layout(architecture: Architecture, parallel: ParallelConfig) -> Layout:
    """The first layout of a cluster, as its config asks for it. Raises `LayoutError`."""
    return first_layout(
        architecture,
        lanes=parallel.lanes,
        tp=parallel.tp,
        expert_only_ranks=parallel.expert_only_ranks,
        slots_per_rank=parallel.slots_per_rank,
    )


def first_layout(
    architecture: Architecture,
    *,
    lanes: int,
    tp: int,
    expert_only_ranks: int = 0,
    slots_per_rank: int | None = None,
) -> Layout:
    """Lanes of `tp` neighbouring ranks, then the ranks without a lane; experts in runs over all of them.

    Without `slots_per_rank` every expert has one slot, and ranks differ by at most one slot. With it every
    rank has exactly that many, and the slots beyond `num_experts` hold second copies, from expert 0 on.
    Raises `LayoutError` if the result is not legal.
    """
    for name, value, least in (
        ("lanes", lanes, 1),
        ("tp", tp, 1),
        ("expert_only_ranks", expert_only_ranks, 0),
    ):
        if value < least:
            raise LayoutError(f"{name}={value}: must be at least {least}")
    num_laned = lanes * tp
    world_size = num_laned + expert_only_ranks
    runs = _expert_runs(architecture.num_experts, world_size, slots_per_rank)
    ranks = tuple(
        RankPlace(
            world_rank=WorldRank(rank),
            lane=LaneId(rank // tp) if rank < num_laned else None,
            tp_rank=TpRank(rank % tp) if rank < num_laned else None,
            experts=(runs[rank],) * architecture.num_moe_layers,
        )
        for rank in range(world_size)
    )
    layout = Layout(tp=tp, ranks=ranks)
    check_layout(architecture, layout)
    return layout


def expert_homes(layout: Layout, moe_layer: int, source: WorldRank) -> tuple[tuple[WorldRank, SlotId], ...]:
    """For each logical expert, the rank and slot that `source` sends its rows to in this layer.

    A copy on `source` itself comes first; otherwise sources take the copies in turn. Every rank can work out
    every other rank's choice, and the choice never depends on the rows.
    """
    copies: dict[int, list[tuple[WorldRank, SlotId]]] = {}
    for rank in layout.ranks:
        for slot, expert in enumerate(rank.experts[moe_layer]):
            copies.setdefault(expert, []).append((rank.world_rank, SlotId(slot)))
    return tuple(_chosen(copies[expert], source, expert) for expert in range(len(copies)))


def _chosen(copies: list[tuple[WorldRank, SlotId]], source: int, expert: int) -> tuple[WorldRank, SlotId]:
    own = [copy for copy in copies if copy[0] == source]
    if own:
        return own[0]
    turn = source - sum(rank < source for rank, _ in copies)  # among the ranks that hold no copy
    return copies[(turn + expert) % len(copies)]


def _expert_runs(num_experts: int, world_size: int, slots_per_rank: int | None) -> list[tuple[ExpertId, ...]]:
    if slots_per_rank is None:
        base, rest = divmod(num_experts, world_size)
        sizes = [base + (rank < rest) for rank in range(world_size)]
    else:
        _check_slots(num_experts, world_size, slots_per_rank)
        sizes = [slots_per_rank] * world_size
    starts = [sum(sizes[:rank]) for rank in range(world_size)]
    return [
        tuple(ExpertId((start + slot) % num_experts) for slot in range(size))
        for start, size in zip(starts, sizes, strict=True)
    ]


def _check_slots(num_experts: int, world_size: int, slots_per_rank: int) -> None:
    least = -(-num_experts // world_size)
    if not least <= slots_per_rank <= num_experts:
        raise LayoutError(
            f"slots_per_rank={slots_per_rank}: {world_size} ranks x {slots_per_rank} slots must hold "
            f"{num_experts} experts, none twice on a rank: use {least} to {num_experts}"
        )
