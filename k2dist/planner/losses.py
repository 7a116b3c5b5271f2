"""What a layout survives: how many ranks or nodes, whichever they are, may be lost at once.

Two answers, both for the worst choice of what is lost:

    in memory    every weight is still in some survivor's memory. A weight is an expert of a layer, or the
                 slice of all else that a tp rank holds; what counts is on how many ranks, or nodes, it lies.
    by reload    the checkpoint can be read again, and the survivors can be laid out anew at the same tp: at
                 least one whole lane, the rest experts only, all experts once and evenly, and room in every
                 lane for `least_tokens` of cache. Second copies are given up for that.

Sequences are never what is lost: their tokens are in the request log. With nodes, neighbouring ranks are on
one node: rank w on node w // (world / nodes), as packing places them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from k2dist.config.architecture import Architecture
from k2dist.messages import Message
from k2dist.parallel import Layout
from k2dist.planner.rank_memory import RankCosts, pages_that_fit
from k2dist.planner.terms import Terms


class Remainder(Message, frozen=True, kw_only=True):
    """Survivors laid out anew. `num_tokens` of cache per lane; None: the weights alone do not fit."""

    num_ranks_lost: int
    lanes: int
    expert_only_ranks: int
    num_tokens: int | None


class Losses(Message, frozen=True, kw_only=True):
    """See the module. None: not known, for want of `device_bytes` or of the number of nodes."""

    num_nodes: int | None
    least_tokens: int
    ranks_in_memory: int
    nodes_in_memory: int | None
    ranks_by_reload: int | None
    nodes_by_reload: int | None
    rank_remainders: tuple[Remainder, ...]  # after 1, 2, ... ranks, up to the first loss that is too much
    node_remainders: tuple[Remainder, ...]

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def survivable_losses(
    architecture: Architecture, layout: Layout, terms: Terms, *, num_nodes: int | None, least_tokens: int
) -> Losses:
    """See the module. `layout` is legal, and `num_nodes` divides its ranks."""
    ranks_per_node = None if num_nodes is None else layout.world_size // num_nodes
    rank_remainders: tuple[Remainder, ...] = ()
    node_remainders: tuple[Remainder, ...] = ()
    if terms.device_bytes is not None:
        costs = RankCosts(architecture, layout.tp, terms)
        rank_remainders = _remainders(costs, layout, 1, least_tokens)
        if ranks_per_node is not None:
            node_remainders = _remainders(costs, layout, ranks_per_node, least_tokens)
    is_known = terms.device_bytes is not None
    return Losses(
        num_nodes=num_nodes,
        least_tokens=least_tokens,
        ranks_in_memory=_fewest_places(layout, 1) - 1,
        nodes_in_memory=None if ranks_per_node is None else _fewest_places(layout, ranks_per_node) - 1,
        ranks_by_reload=_num_survived(rank_remainders, least_tokens) if is_known else None,
        nodes_by_reload=(
            _num_survived(node_remainders, least_tokens) if is_known and num_nodes is not None else None
        ),
        rank_remainders=rank_remainders,
        node_remainders=node_remainders,
    )


def _fewest_places(layout: Layout, ranks_per_place: int) -> int:
    """On how many places (ranks or nodes) the weight lies that lies on fewest."""
    held = [(rank.world_rank // ranks_per_place, rank) for rank in layout.ranks]
    slices = [(place, (rank.tp_rank,)) for place, rank in held if rank.tp_rank is not None]
    fewest = _places_of_rarest(slices)  # of what is no expert, each tp rank has its slice
    for layer in set(zip(*(rank.experts for rank in layout.ranks), strict=True)):  # most are alike
        fewest = min(
            fewest, _places_of_rarest([(place, row) for (place, _), row in zip(held, layer, strict=True)])
        )
    return fewest


def _places_of_rarest(held: Iterable[tuple[int, Sequence[int]]]) -> int:
    """`held`: what lies on a place; a place may come more than once."""
    places: dict[int, set[int]] = {}
    for place, weights in held:
        for weight in weights:
            places.setdefault(weight, set()).add(place)
    return min(map(len, places.values()))


def _remainders(
    costs: RankCosts, layout: Layout, ranks_per_loss: int, least_tokens: int
) -> tuple[Remainder, ...]:
    """After each number of losses, up to the first that leaves too little."""
    found: list[Remainder] = []
    for left in range(layout.world_size - ranks_per_loss, -1, -ranks_per_loss):
        found.append(_remainder(costs, layout, left, least_tokens))
        if not _suffices(found[-1], least_tokens):
            break
    return tuple(found)


def _remainder(costs: RankCosts, layout: Layout, num_left: int, least_tokens: int) -> Remainder:
    """As many lanes as have room for `least_tokens` each; else the number that leaves most room."""
    most_lanes = min(layout.num_lanes, num_left // costs.tp)
    laid_out = []
    for lanes in range(most_lanes, 0, -1):
        laid_out.append(_laid_out(costs, layout.world_size - num_left, num_left, lanes))
        if _suffices(laid_out[-1], least_tokens):
            return laid_out[-1]
    if not laid_out:
        return Remainder(
            num_ranks_lost=layout.world_size - num_left, lanes=0, expert_only_ranks=num_left, num_tokens=None
        )
    return max(laid_out, key=lambda remainder: remainder.num_tokens or -1)


def _laid_out(costs: RankCosts, num_lost: int, num_left: int, lanes: int) -> Remainder:
    assert costs.terms.device_bytes is not None
    num_pages = pages_that_fit(costs.evenly(num_left, lanes), costs.terms.device_bytes)
    return Remainder(
        num_ranks_lost=num_lost,
        lanes=lanes,
        expert_only_ranks=num_left - lanes * costs.tp,
        num_tokens=None if num_pages is None else num_pages * costs.terms.page_tokens,
    )


def _num_survived(remainders: tuple[Remainder, ...], least_tokens: int) -> int:
    return sum(_suffices(remainder, least_tokens) for remainder in remainders)


def _suffices(remainder: Remainder, least_tokens: int) -> bool:
    return remainder.num_tokens is not None and remainder.num_tokens >= least_tokens


def _lines(losses: Losses) -> Iterator[str]:
    of_nodes = "" if losses.num_nodes is None else f" of {losses.num_nodes} nodes"
    nodes = "" if losses.nodes_in_memory is None else f", {losses.nodes_in_memory}{of_nodes}"
    yield "may be lost, whichever they are:"
    yield f"  {losses.ranks_in_memory} ranks{nodes}, with every weight still in a survivor's memory"
    if losses.ranks_by_reload is None:
        yield "  by reload: not known, since nodes.device_bytes is not given"
        return
    nodes = "" if losses.nodes_by_reload is None else f", {losses.nodes_by_reload}{of_nodes}"
    yield (
        f"  {losses.ranks_by_reload} ranks{nodes}, if survivors read their new parts from the checkpoint, "
        f"with room for {losses.least_tokens:,} tokens a lane"
    )
    for what, remainders in (("ranks", losses.rank_remainders), ("nodes", losses.node_remainders)):
        if remainders:
            count = len(remainders)
            are = f"{count} {what} are" if count > 1 else f"one {what.removesuffix('s')} is"
            yield f"    {are} too many: {_left(remainders[-1])}"


def _left(remainder: Remainder) -> str:
    if remainder.lanes == 0:
        return f"{remainder.expert_only_ranks} ranks are left, not one whole lane"
    if remainder.num_tokens is None:
        return "the weights do not fit what is left"
    return f"{remainder.num_tokens:,} tokens are left for each of {remainder.lanes} lanes"
