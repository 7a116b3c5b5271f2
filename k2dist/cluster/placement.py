"""Room for a world in Ray: one bundle for the ranks that share a machine, or an error with the arithmetic.

With `nodes.num_nodes` that is one bundle a machine, each on a machine of its own; else one a lane, placed as
`ranks.placement` says. Ray keeps a bundle together, so no rank is ever parted from those it has to be with.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from k2dist.cluster.world import World
from k2dist.errors import CapacityError
from k2dist.ids import WorldRank
from k2dist.parallel import machine_groups

NAME = "ranks"  # of the placement group, in the cluster's namespace
_RAY_PRECISION = 1e-4  # Ray counts resources in ten-thousandths
_LOOK_S = 1.0  # between two looks at which machines have joined

Resources = Mapping[str, float]


def await_capacity(world: World, tell: Callable[[str], None]) -> None:
    """Until all of Ray's nodes together, empty, could hold the ranks: CapacityError if they could not within
    `deadlines.nodes_s`. `tell` hears what is missing meanwhile."""
    give_up_s = time.monotonic() + world.config.deadlines.nodes_s
    while (missing := shortage(world, _nodes())) is not None:
        if time.monotonic() >= give_up_s:
            raise CapacityError(missing)
        tell(f"waiting for machines: {missing.partition(';')[0]}")
        time.sleep(_LOOK_S)


def shortage(world: World, nodes: Iterable[Resources]) -> str | None:
    """What machines with these resources, empty, lack to hold the ranks, and a remedy; None if nothing."""
    ranks, layout, nodes = world.config.ranks, world.layout, tuple(nodes)
    each = _rank_resources(world)
    for resource, amount in each.items():
        needed, there = layout.world_size * amount, sum(node.get(resource, 0.0) for node in nodes)
        if needed > there + _RAY_PRECISION:
            return (
                f"the layout needs {layout.world_size} ranks x {amount:g} {resource} = {needed:g} "
                f"{resource}, and Ray has {there:g}; lower ranks.rank_{resource.lower()}s, use fewer ranks, "
                f"or give Ray more"
            )
    num_nodes = world.config.nodes.num_nodes or 1
    num_ranks = max(map(len, _groups(world)))
    fit = sum(
        all(
            num_ranks * amount <= node.get(resource, 0.0) + _RAY_PRECISION
            for resource, amount in each.items()
        )
        for node in nodes
    )
    if fit >= num_nodes:
        return None
    room = " and ".join(f"{num_ranks * amount:g} {resource}" for resource, amount in each.items())
    why = "their lane is" if world.config.nodes.num_nodes is None else "neighbouring ranks are"
    return (
        f"{num_ranks} ranks have to be on one machine ({why}), so {num_nodes} machines with {room} each are "
        f"needed, and Ray has {fit} of {len(nodes)}; give Ray larger machines or more of them, or say in "
        f"nodes.num_nodes over how many to spread{'' if ranks.rank_gpus else ', or lower ranks.rank_cpus'}"
    )


def reserve(world: World) -> PlacementGroup:
    """Ask for one bundle per group; does not wait. Errors: CapacityError."""
    missing = shortage(world, _nodes())
    if missing is not None:
        raise CapacityError(missing)
    each = _rank_resources(world)
    is_spread = world.config.nodes.num_nodes is not None
    return placement_group(
        [{name: len(group) * amount for name, amount in each.items()} for group in _groups(world)],
        strategy="STRICT_SPREAD" if is_spread else world.config.ranks.placement.upper(),
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


def bundle_of(group: PlacementGroup, world: World, world_rank: WorldRank) -> Any:
    """The scheduling strategy that puts an actor into its rank's bundle."""
    (index,) = (index for index, ranks in enumerate(_groups(world)) if world_rank in ranks)
    return PlacementGroupSchedulingStrategy(
        placement_group=group,
        placement_group_bundle_index=index,
        placement_group_capture_child_tasks=False,
    )


def detached_here(name: str) -> dict[str, Any]:
    """Options of an actor that lives until it is ended, on the node of the process that makes it.

    Supervisor, coordinator and gateway are where the driver is, so that clients find them where
    `service.grpc` says; Ray puts what needs no resources on any node.
    """
    here = ray.get_runtime_context().get_node_id()
    return {
        "name": name,
        "lifetime": "detached",
        "num_cpus": 0,
        "max_restarts": 0,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(here, soft=False),
    }


def _groups(world: World) -> tuple[tuple[WorldRank, ...], ...]:
    return machine_groups(world.layout, world.config.nodes.num_nodes)


def _rank_resources(world: World) -> dict[str, float]:
    ranks = world.config.ranks
    return {"CPU": ranks.rank_cpus} | ({"GPU": ranks.rank_gpus} if ranks.rank_gpus else {})


def _nodes() -> list[Resources]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _total(resource: str) -> float:
    return float(ray.cluster_resources().get(resource, 0.0))
