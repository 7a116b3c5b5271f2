"""Which ranks have to share a machine: what a layout takes for granted, and placement has to bring about."""

from __future__ import annotations

from k2dist.ids import LaneId, WorldRank
from k2dist.parallel.layout import Layout


def machine_groups(layout: Layout, num_nodes: int | None) -> tuple[tuple[WorldRank, ...], ...]:
    """Every rank once; the ranks of a group are to be on one machine.

    With `num_nodes`, which divides the ranks: one group a machine, neighbouring ranks together. Without: one
    group a lane, so that attention's sums never cross a network, and each rank without a lane by itself.
    """
    ranks = tuple(place.world_rank for place in layout.ranks)
    if num_nodes is not None:
        each = layout.world_size // num_nodes
        return tuple(ranks[first : first + each] for first in range(0, len(ranks), each))
    lanes = tuple(layout.members(LaneId(lane)) for lane in range(layout.num_lanes))
    return lanes + tuple((place.world_rank,) for place in layout.ranks if place.lane is None)
