"""All findings of all facts, in the order of a report: machines, what differs between them, network, Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from k2dist.doctor.facts import ClusterFacts, NodeFacts
from k2dist.doctor.finding import Finding, error, ok, warning
from k2dist.doctor.needs import Needs
from k2dist.doctor.network_checks import link_findings, mtu_findings, nic_findings
from k2dist.doctor.node_checks import node_findings
from k2dist.doctor.ray_checks import PRECISION, ray_findings

# Field of Versions -> whether ranks may differ in it where the config allows a mix.
_COMPARED = {
    "python": False,
    "ray": False,
    "k2dist": False,
    "k2dist_code": False,
    "kernels_code": True,
    "torch": True,
    "triton": True,
}


def diagnose(facts: ClusterFacts, needs: Needs | None) -> tuple[Finding, ...]:
    """`needs` None: no config was given, and only what is wrong for any is found."""
    return tuple(_findings(facts, needs))


def _findings(facts: ClusterFacts, needs: Needs | None) -> Iterator[Finding]:
    hosts = hosts_of(facts, needs)
    most = 0 if needs is None else needs.ranks_on_a_node(len(hosts))
    for node in facts.nodes:
        yield from node_findings(node, needs, most if node.node in hosts else 0)
    if len(facts.nodes) > 1:
        yield from _same_on_all(facts.nodes, needs)
    is_alone = len(hosts) <= 1
    for node in facts.nodes:
        if node.node in hosts:
            yield from nic_findings(node, needs, is_alone=is_alone)
    yield from mtu_findings([node for node in facts.nodes if node.node in hosts])
    yield from link_findings(facts.links, needs)
    yield from ray_findings(facts, needs)


def hosts_of(facts: ClusterFacts, needs: Needs | None) -> frozenset[str]:
    """Nodes that may get ranks: with a Ray, those on which it counts enough for one."""
    if facts.ray_nodes is None or needs is None:
        return frozenset(node.node for node in facts.nodes)
    return frozenset(
        node.node
        for node in facts.ray_nodes
        if all(
            node.total.get(name, 0.0) + PRECISION >= amount for name, amount in needs.rank_resources.items()
        )
    )


def _same_on_all(nodes: Sequence[NodeFacts], needs: Needs | None) -> Iterator[Finding]:
    allows_mix = needs is not None and needs.allows_mix
    has_difference = False
    for field, may_be_mixed in _COMPARED.items():
        what = _difference(nodes, _version(field))
        if what is not None:
            has_difference = True
            say = warning if may_be_mixed and allows_mix else error
            yield say("versions", f"{field} {what}", "use one image, or install the same on every node")
    if not has_difference:
        versions = nodes[0].versions
        code = f"k2dist {versions.k2dist} ({versions.k2dist_code}), kernels {versions.kernels_code}"
        yield ok("versions", f"the same on {len(nodes)} nodes: {code}, torch {versions.torch}")
    yield from _alike(nodes, "gpus", "driver ", _driver, "one driver on all nodes is easier to reason about")
    yield from _alike(nodes, "machine", "instructions ", lambda node: node.instructions, _MIXED)
    yield from _alike(nodes, "gpus", "", _gpu_name, _MIXED)
    what = _difference(nodes, lambda node: node.model.digest if node.model is not None else "")
    if what is not None:
        yield error("model", f"another one: digest {what}", "copy the same model to every node")


_MIXED = "ranks on unlike devices are refused when they join, unless ranks.allow_mix: true"


def _alike(
    nodes: Sequence[NodeFacts], check: str, what: str, value: Callable[[NodeFacts], str], remedy: str
) -> Iterator[Finding]:
    found = _difference(nodes, value)
    if found is not None:
        yield warning(check, what + found, remedy)


def _version(field: str) -> Callable[[NodeFacts], str]:
    return lambda node: str(getattr(node.versions, field))


def _driver(node: NodeFacts) -> str:
    return node.gpus[0].driver if node.gpus else ""


def _gpu_name(node: NodeFacts) -> str:
    return node.gpus[0].name if node.gpus else ""


def _difference(nodes: Sequence[NodeFacts], value: Callable[[NodeFacts], str]) -> str | None:
    """Between the first node with a value and the first with another one; those without any do not count."""
    having = [node for node in nodes if value(node)]
    for other in having[1:]:
        if value(other) != value(having[0]):
            return f"{value(having[0])} on {having[0].node}, {value(other)} on {other.node}"
    return None
