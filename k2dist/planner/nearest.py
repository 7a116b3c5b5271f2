"""What would work where a config does not: the nearest layouts that hold the model and the cache asked for.

Near is, in this order: the same machines, then more of them; then a tp that differs by as few halvings or
doublings as may be.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from k2dist.config.architecture import Architecture
from k2dist.config.cluster import ClusterConfig
from k2dist.messages import Message
from k2dist.parallel import legal_tp
from k2dist.planner.devices import configured_device
from k2dist.planner.memory import gb
from k2dist.planner.rank_memory import RankCosts, pages_that_fit
from k2dist.planner.site import ranks_per_node
from k2dist.planner.terms import Terms, configured_terms

MOST_NODES = 16


class Fit(Message, frozen=True, kw_only=True):
    """An even layout that is legal. `num_pages`: of each lane; 0: the weights alone do not fit."""

    num_nodes: int
    lanes: int
    tp: int
    num_pages: int


def nearest_fits(config: ClusterConfig, architecture: Architecture) -> Iterator[str]:
    """Lines to put under a refusal; none where a device's memory is not known."""
    terms = configured_terms(config, architecture)
    if terms.device_bytes is None or config.parallel.world_size > architecture.num_experts:
        return
    parallel = config.parallel
    size = ranks_per_node(config, parallel.world_size, configured_device(config))
    asked_nodes = -(-parallel.world_size // size)
    asked = config.cache.num_pages
    here = _best(even_fits(architecture, terms, asked_nodes, size), parallel.tp, asked)
    if here is not None and here.num_pages >= asked:
        yield f"on these machines would work: {_said(here, terms)}"
        return
    if here is not None and here.num_pages > 0:
        yield f"on these machines, with less cache: {_said(here, terms)}"
    else:
        yield f"on {_nodes(asked_nodes)} of {size} no layout holds the weights and any cache"
    for nodes in range(asked_nodes + 1, MOST_NODES + 1):
        fit = _best(even_fits(architecture, terms, nodes, size), parallel.tp, asked)
        if fit is not None and fit.num_pages >= asked:
            yield f"the nearest that would work: {_nodes(nodes)} of {size}, {_said(fit, terms)}"
            return
    yield f"up to {MOST_NODES} nodes of {size} no layout holds {asked} pages a lane; ask for fewer"


def even_fits(architecture: Architecture, terms: Terms, num_nodes: int, ranks_per_node: int) -> list[Fit]:
    """Every legal tp on so many ranks, with as many pages as fit each lane."""
    world_size = num_nodes * ranks_per_node
    assert terms.device_bytes is not None, "memory is known"
    if world_size > max(architecture.num_experts, 1):
        return []
    fits = []
    for tp in legal_tp(architecture):
        if world_size % tp == 0:
            lanes = world_size // tp
            ranks = RankCosts(architecture, tp, terms).evenly(world_size, lanes)
            num_pages = pages_that_fit(ranks, terms.device_bytes) or 0
            fits.append(Fit(num_nodes=num_nodes, lanes=lanes, tp=tp, num_pages=num_pages))
    return fits


def _best(fits: list[Fit], tp: int, num_pages: int) -> Fit | None:
    """The nearest tp of those with pages enough; where none has, the one with most."""
    enough = [fit for fit in fits if fit.num_pages >= num_pages]
    if enough:
        return min(enough, key=lambda fit: abs(math.log2(fit.tp / tp)))
    return max(fits, key=lambda fit: fit.num_pages, default=None)


def _said(fit: Fit, terms: Terms) -> str:
    tokens = fit.num_pages * terms.page_tokens
    assert terms.device_bytes is not None
    return (
        f"lanes: {fit.lanes}, tp: {fit.tp}, cache.num_pages up to {fit.num_pages:,} ({tokens:,} tokens a "
        f"lane) in {gb(terms.device_bytes)} a rank"
    )


def _nodes(count: int) -> str:
    return "one node" if count == 1 else f"{count} nodes"
