"""The links between nodes, each pair in its turn and all together, measured by the processes on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from k2dist.doctor.facts import Link
from k2dist.doctor.pairings import rounds
from k2dist.probe.answers import await_answers
from k2dist.probe.links import CALL_S, JOIN_S, LinkRate, link_of

LINK_S = 2 * JOIN_S + 3 * CALL_S  # for one measurement, whose first on a node imports torch


def measure_links(
    probers: Mapping[str, Any], nodes: Sequence[str], transport: str = "gloo"
) -> tuple[Link, ...]:
    """Pairs in rounds, such that no node is busy twice at a time; then all at once, if they are more than
    two. A single node is measured against itself."""
    if len(nodes) == 1:
        (node,) = nodes
        answers = await_answers({node: probers[node].link_here.remote()}, LINK_S)
        return (answers.given.get(node) or _silent((node, node), transport, answers.silent[node]),)
    links: list[Link] = []
    for pairs in rounds(nodes):
        links += _measure(probers, pairs, transport)
    if len(nodes) > 2:
        links += _measure(probers, [tuple(nodes)], transport)
    return tuple(links)


def _measure(probers: Mapping[str, Any], groups: Sequence[tuple[str, ...]], transport: str) -> list[Link]:
    """All `groups` at once; the first node of each hosts the store at which they meet."""
    ports = await_answers({group: probers[group[0]].host_store.remote() for group in groups}, LINK_S)
    asked = {
        (group, node): probers[node].link.remote(
            group[0], port, name="-".join(group), rank=rank, size=len(group), transport=transport
        )
        for group, port in ports.given.items()
        for rank, node in enumerate(group)
    }
    answers = await_answers(asked, LINK_S)
    links = [_silent(group, transport, reason) for group, reason in ports.silent.items()]
    for group in ports.given:
        rates = [
            answers.given.get((group, node)) or LinkRate(reason=f"{node} {answers.silent[group, node]}")
            for node in group
        ]
        links.append(link_of(group, transport, rates))
    return links


def _silent(nodes: tuple[str, ...], transport: str, reason: str) -> Link:
    return Link(nodes=nodes, transport=transport, reason=reason)
