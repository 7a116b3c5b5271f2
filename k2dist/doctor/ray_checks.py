"""What Ray counts against what the config asks for, and why placement groups wait. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from k2dist.doctor.facts import ClusterFacts, PlacementGroup, RayNode
from k2dist.doctor.finding import Finding, error, ok, warning
from k2dist.doctor.needs import Needs

PRECISION = 1e-4  # Ray counts in ten-thousandths
_PENDING = ("PENDING", "RESCHEDULING", "PREPARED")

Resources = Mapping[str, float]


def ray_findings(facts: ClusterFacts, needs: Needs | None) -> Iterator[Finding]:
    """Of the Ray that was joined, or of its absence."""
    nodes = facts.ray_nodes
    if nodes is None:
        if needs is not None and (needs.num_nodes or 1) > 1:
            remedy = "start Ray on all of them and set RAY_ADDRESS, or drop nodes.num_nodes"
            yield error("ray", f"this machine alone, and nodes.num_nodes={needs.num_nodes}", remedy)
        return
    for silent in facts.silent:
        yield error("ray", silent.reason, "look at that machine and at its raylet's log", silent.node)
    yield from _room(nodes, needs)
    for group in facts.placement_groups:
        if group.state in _PENDING:
            yield warning(
                "placement", f"group {group.name or '(no name)'} waits: {explain(group, nodes)}", _WAIT
            )
    yield from _uncounted_gpus(facts, nodes)


_WAIT = "end what holds the rest (`ray list actors`, `k2dist stop`), or give Ray more"


def _room(nodes: Sequence[RayNode], needs: Needs | None) -> Iterator[Finding]:
    if needs is None:
        total = _sum([node.total for node in nodes])
        yield ok("ray", f"{len(nodes)} nodes with {_shown(total)}")
        return
    each = needs.rank_resources
    wanted = f"{needs.world_size} ranks x {_shown(each)}"
    places = {node.node: _times(each, node.total) for node in nodes}
    per_node = needs.ranks_on_a_node(len(nodes)) if needs.num_nodes is not None else 1
    enough = [node for node, count in places.items() if count >= per_node]
    shown = ", ".join(f"{node} {count}" for node, count in places.items())
    if sum(places.values()) < needs.world_size:
        yield error(
            "ray",
            f"{wanted}, and its nodes have room for {sum(places.values())}: {shown}",
            "give Ray more nodes, start them with more --num-cpus or --num-gpus, or use fewer ranks",
        )
    elif needs.num_nodes is not None and len(enough) < needs.num_nodes:
        yield error(
            "ray",
            f"nodes.num_nodes={needs.num_nodes} with {per_node} ranks each, and {len(enough)} nodes have so "
            f"much room: {shown}",
            "give Ray more or larger nodes, or another nodes.num_nodes",
        )
    elif sum(_times(each, node.free) for node in nodes) < needs.world_size:
        free = ", ".join(f"{node.node} {_times(each, node.free)}" for node in nodes)
        yield warning(  # and no error: a cluster that is ending gives it back, and starting waits for that
            "ray", f"{wanted}, and what is free now has room for fewer: {free}", _WAIT
        )
    else:
        yield ok("ray", f"{wanted}; room for {shown}")


def _uncounted_gpus(facts: ClusterFacts, nodes: Sequence[RayNode]) -> Iterator[Finding]:
    counted = {node.node: node.total.get("GPU", 0.0) for node in nodes}
    for node in facts.nodes:
        if node.node in counted and len(node.gpus) != counted[node.node]:
            yield warning(
                "ray",
                f"Ray counts {counted[node.node]:g} GPUs, the driver {len(node.gpus)}",
                "start its Ray with --num-gpus, or see what CUDA_VISIBLE_DEVICES was when it started",
                node.node,
            )


def explain(group: PlacementGroup, nodes: Sequence[RayNode]) -> str:
    """Why a group has no place: what no node could ever hold, or what is not free now."""
    wanted = f"{len(group.bundles)} bundles, {_shown(_sum(group.bundles))}, {group.strategy}"
    for bundle in group.bundles:
        if not any(_times(bundle, node.total) for node in nodes):
            return f"no node has {_shown(bundle)}, and a bundle asks for that ({wanted})"
    if group.strategy == "STRICT_SPREAD" and len(nodes) < len(group.bundles):
        return f"each of {len(group.bundles)} bundles wants a node of its own, and there are {len(nodes)}"
    together = _sum(group.bundles)
    if group.strategy == "STRICT_PACK":
        if not any(_times(together, node.total) for node in nodes):
            return f"all bundles want one node, and none has {_shown(together)}"
        if not any(_times(together, node.free) for node in nodes):
            return f"all bundles want one node, and none has {_shown(together)} free now"
    free = ", ".join(f"{node.node} {_shown({k: node.free.get(k, 0.0) for k in together})}" for node in nodes)
    return f"{wanted}; free now: {free}"


def _times(each: Resources, there: Resources) -> int:
    """How often `each` fits."""
    return min(
        (int((there.get(name, 0.0) + PRECISION) / amount) for name, amount in each.items() if amount > 0),
        default=1,
    )


def _sum(bundles: Sequence[Resources]) -> dict[str, float]:
    names = sorted({name for bundle in bundles for name in bundle if name in ("CPU", "GPU")} | {"CPU"})
    return {name: sum(bundle.get(name, 0.0) for bundle in bundles) for name in names}


def _shown(resources: Resources) -> str:
    return " and ".join(f"{amount:g} {name}" for name, amount in resources.items()) or "nothing"
