"""The nodes of the Ray that this process has joined, and what Ray itself says of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import ray
from ray.util import placement_group_table

from k2dist.doctor.facts import PlacementGroup, RayNode

# Besides these Ray counts its own, such as node:10.0.0.1 and accelerator_type:H200, which no rank takes.
_COUNTED = ("CPU", "GPU", "memory", "object_store_memory")


class Node(NamedTuple):
    """A living node: Ray's id, and the address by which Ray knows it."""

    ray_id: str
    address: str


def living_nodes() -> tuple[Node, ...]:
    """By address."""
    found = [Node(node["NodeID"], node["NodeManagerAddress"]) for node in ray.nodes() if node["Alive"]]
    return tuple(sorted(found, key=lambda node: node.address))


def counted() -> tuple[RayNode, ...]:
    """What Ray counts on each living node."""
    free = ray._private.state.available_resources_per_node()
    return tuple(
        RayNode(
            node=node["NodeManagerAddress"],
            total=_named(node["Resources"]),
            free=_named(free.get(node["NodeID"], {})),
        )
        for node in ray.nodes()
        if node["Alive"]
    )


def placement_groups() -> tuple[PlacementGroup, ...]:
    """Those that have not been removed."""
    listed = placement_group_table().values()
    return tuple(
        PlacementGroup(
            name=group["name"],
            state=group["state"],
            strategy=group["strategy"],
            bundles=tuple(_named(bundle) for _, bundle in sorted(group["bundles"].items())),
        )
        for group in listed
        if group["state"] != "REMOVED"
    )


def _named(resources: dict[str, Any]) -> dict[str, float]:
    return {name: float(resources[name]) for name in _COUNTED if name in resources}
