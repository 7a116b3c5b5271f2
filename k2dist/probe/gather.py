"""All facts at once: of this machine, or of every node of the Ray that this process has joined."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from msgspec.structs import replace
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from k2dist.doctor.facts import Clock, ClusterFacts, Link, NodeFacts, RayNode, Silent
from k2dist.probe.answers import await_answers
from k2dist.probe.cluster_links import measure_links
from k2dist.probe.links import measure_here
from k2dist.probe.machine import DISK_S, Wanted, node_facts, own_address
from k2dist.probe.nodes import Node, counted, living_nodes, placement_groups
from k2dist.probe.prober import Prober

FACTS_S = 30.0  # for a node's process to start and answer
NUM_PINGS = 5


def gather_here(wanted: Wanted, *, with_links: bool) -> ClusterFacts:
    """Of this machine alone, without Ray."""
    node = own_address()
    links = (measure_here(node),) if with_links else ()
    return ClusterFacts(driver=node, nodes=(node_facts(node, wanted),), links=links)


def gather(wanted: Wanted, *, with_links: bool) -> ClusterFacts:
    """Of every living node. Nodes that do not answer in time are listed as silent."""
    driver = ray.util.get_node_ip_address()
    nodes = living_nodes()
    ray_nodes = counted()
    with _probers(nodes, num_gpus=0) as probers:
        asked = {
            address: prober.facts.remote(_wanted_of(address, wanted, driver))
            for address, prober in probers.items()
        }
        answers = await_answers(asked, FACTS_S + (DISK_S if wanted.measures_disk else 0.0))
        found = [_with_clock(facts, probers[facts.node]) for facts in answers.given.values()]
        links = measure_links(probers, list(answers.given)) if with_links else ()
    if with_links:
        links += _nccl_links([node for node in nodes if _free_gpus(node.address, ray_nodes)])
    return ClusterFacts(
        driver=driver,
        nodes=tuple(found),
        silent=tuple(Silent(node=node, reason=reason) for node, reason in answers.silent.items()),
        links=links,
        ray_nodes=ray_nodes,
        placement_groups=placement_groups(),
    )


def _nccl_links(nodes: Sequence[Node]) -> tuple[Link, ...]:
    """Between the first free GPUs of nodes that have one; with fewer than two such nodes there is no link."""
    if len(nodes) < 2:
        return ()
    with _probers(nodes, num_gpus=1) as probers:
        return measure_links(probers, [node.address for node in nodes], "nccl")


def _free_gpus(address: str, ray_nodes: Sequence[RayNode]) -> float:
    return sum(node.free.get("GPU", 0.0) // 1 for node in ray_nodes if node.node == address)


def _wanted_of(address: str, wanted: Wanted, driver: str) -> Wanted:
    return wanted if address == driver else replace(wanted, ports=())


@contextmanager
def _probers(nodes: Sequence[Node], *, num_gpus: int) -> Iterator[dict[str, Any]]:
    """A process on each of `nodes`, by address; gone with the context."""
    kind = ray.remote(num_cpus=0, num_gpus=num_gpus, max_restarts=0)(Prober)
    actors = {
        node.address: kind.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node.ray_id, soft=False)
        ).remote(node.address)
        for node in nodes
    }
    try:
        yield actors
    finally:
        for actor in actors.values():
            ray.kill(actor, no_restart=True)


def _with_clock(facts: NodeFacts, prober: Any) -> NodeFacts:
    """As NTP does it: the answer was given in the middle of the shortest of a few round trips."""
    clocks = []
    for _ in range(NUM_PINGS):
        asked_s = time.time()
        answers = await_answers({facts.node: prober.now_s.remote()}, FACTS_S)
        if facts.node not in answers.given:
            return facts
        answered_s = time.time()
        middle_s, error_s = (asked_s + answered_s) / 2, (answered_s - asked_s) / 2
        clocks.append(Clock(offset_s=answers.given[facts.node] - middle_s, error_s=error_s))
    return replace(facts, clock=min(clocks, key=lambda clock: clock.error_s))
