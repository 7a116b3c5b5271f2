"""Room for a world in Ray: one bundle per rank, or an error with the arithmetic."""

from __future__ import annotations

from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from k2dist.cluster.world import World
from k2dist.errors import CapacityError
from k2dist.ids import WorldRank

NAME = "ranks"  # of the placement group, in the cluster's namespace
_RAY_PRECISION = 1e-4  # Ray counts resources in ten-thousandths


def check_capacity(world: World) -> None:
    """CapacityError if all of Ray's nodes together, empty, could not hold the ranks."""
    for resource, each, remedy in (
        ("CPU", world.config.ranks.rank_cpus, "ranks.rank_cpus"),
        ("GPU", world.config.ranks.rank_gpus, "ranks.rank_gpus"),
    ):
        needed = world.layout.world_size * each
        there = ray.cluster_resources().get(resource, 0.0)
        if needed > there + _RAY_PRECISION:
            raise CapacityError(
                f"the layout needs {world.layout.world_size} ranks x {each:g} {resource} = "
                f"{needed:g} {resource}, and Ray has {there:g}; lower {remedy}, use fewer ranks, or give "
                f"Ray more"
            )


def reserve(world: World) -> PlacementGroup:
    """Ask for one bundle per rank, in rank order; does not wait. Errors: CapacityError."""
    check_capacity(world)
    ranks = world.config.ranks
    bundle = {"CPU": ranks.rank_cpus} | ({"GPU": ranks.rank_gpus} if ranks.rank_gpus else {})
    return placement_group(
        [bundle] * world.layout.world_size,
        strategy=ranks.placement.upper(),
        name=NAME,
        lifetime="detached",
    )


def await_bundles(group: PlacementGroup, world: World) -> None:
    """Wait until every bundle is there. CapacityError if they are not within most of `deadlines.start_s`."""
    wait_s = 0.9 * world.config.deadlines.start_s  # the table's own deadline knows no arithmetic
    if not group.wait(wait_s):
        free = ray.available_resources()
        raise CapacityError(
            f"no room for the ranks within {wait_s:g} s: they need {world.num_cpus:g} CPU and "
            f"{world.num_gpus:g} GPU, free are {free.get('CPU', 0.0):g} and {free.get('GPU', 0.0):g} of "
            f"{_total('CPU'):g} and {_total('GPU'):g}; stop what holds them, or change ranks.placement"
        )


def bundle_of(group: PlacementGroup, world_rank: WorldRank) -> Any:
    """The scheduling strategy that puts an actor into its rank's bundle."""
    return PlacementGroupSchedulingStrategy(
        placement_group=group,
        placement_group_bundle_index=world_rank,
        placement_group_capture_child_tasks=False,
    )


def release(group: PlacementGroup) -> None:
    """Give the bundles back; what still runs in them is killed."""
    remove_placement_group(group)


def _total(resource: str) -> float:
    return float(ray.cluster_resources().get(resource, 0.0))
