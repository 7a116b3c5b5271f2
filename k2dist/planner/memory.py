"""A layout's memory, rank by rank; the pages that are left; and a refusal with the arithmetic.

A lane's cache is whole on each of its ranks: MLA has one latent for all heads, so tp divides attention's
weights and never the cache. Every lane has as many pages as the fullest rank of any lane has room for.
"""

from __future__ import annotations

from collections.abc import Iterator

from k2dist.config.architecture import Architecture
from k2dist.errors import LayoutError
from k2dist.messages import Message
from k2dist.parallel import Layout, check_layout
from k2dist.planner.rank_memory import RankCosts, RankMemory, pages_that_fit
from k2dist.planner.terms import Terms

GB = 10**9


class MemoryPlan(Message, frozen=True, kw_only=True):
    """`ranks` in rank order. `num_pages`: what fits each lane; 0 also where weights alone do not fit, and
    None where `device_bytes` is not known."""

    ranks: tuple[RankMemory, ...]
    page_tokens: int
    max_positions: int  # of the longest sequence that the model allows
    device_bytes: int | None
    num_pages: int | None

    @property
    def fullest(self) -> RankMemory:
        """The rank that decides: of those with a lane, the one that leaves least for pages."""
        laned = [rank for rank in self.ranks if rank.lane is not None]
        return max(laned, key=lambda rank: rank.fixed_bytes)

    @property
    def num_tokens(self) -> int | None:
        """What a lane's pages hold."""
        return None if self.num_pages is None else self.num_pages * self.page_tokens

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def plan_memory(architecture: Architecture, layout: Layout, terms: Terms) -> MemoryPlan:
    """Every rank's memory, and the pages that fit. Raises `LayoutError` for a layout that is not legal.

    What does not fit is no error here: `check_memory` refuses it.
    """
    check_layout(architecture, layout)
    costs = RankCosts(architecture, layout.tp, terms)
    counts = [tuple(len(experts) for experts in place.experts) for place in layout.ranks]
    all_slots = min((sum(layer) for layer in zip(*counts, strict=True)), default=0)
    ranks = tuple(
        costs.rank(place.world_rank, place.lane, lanes=layout.num_lanes, slots=slots, all_slots=all_slots)
        for place, slots in zip(layout.ranks, counts, strict=True)
    )
    device_bytes = terms.device_bytes
    return MemoryPlan(
        ranks=ranks,
        page_tokens=terms.page_tokens,
        max_positions=architecture.max_positions,
        device_bytes=device_bytes,
        num_pages=None if device_bytes is None else pages_that_fit(ranks, device_bytes) or 0,
    )


def check_memory(plan: MemoryPlan, num_pages: int) -> None:
    """Raise `LayoutError` with the arithmetic unless every rank holds its part and its lane's `num_pages`.

    Where `device_bytes` is None nothing is known, and nothing refused.
    """
    device_bytes = plan.device_bytes
    if device_bytes is None or plan.num_pages is None:
        return
    short = [rank for rank in plan.ranks if rank.free_bytes(device_bytes) < 0]
    if short:
        worst = min(short, key=lambda rank: rank.free_bytes(device_bytes))
        raise LayoutError(
            f"rank {worst.world_rank} does not fit its device, before any page of cache: "
            f"{arithmetic(worst)}, of {gb(device_bytes)}: {gb(-worst.free_bytes(device_bytes))} too much on "
            f"{len(short)} of {len(plan.ranks)} ranks; {_REMEDIES}"
        )
    if plan.num_pages < num_pages:
        rank = plan.fullest
        raise LayoutError(
            f"cache.num_pages={num_pages}: {num_pages:,} pages x {rank.page_bytes:,} bytes = "
            f"{gb(num_pages * rank.page_bytes)} for {num_pages * plan.page_tokens:,} tokens, but rank "
            f"{rank.world_rank} has {gb(rank.free_bytes(device_bytes))} left: {gb(device_bytes)} less "
            f"{arithmetic(rank)}; use at most {plan.num_pages} pages ({plan.num_tokens:,} tokens), or "
            f"{_REMEDIES}"
        )


_REMEDIES = "use more ranks, devices with more memory, or a smaller scheduler.step_tokens"


def arithmetic(rank: RankMemory) -> str:
    """The sum that is this rank's fixed part, written out."""
    return " + ".join(f"{name} {gb(value)}" for name, value in rank.parts().items()) + (
        f" = {gb(rank.fixed_bytes)}"
    )


def gb(num_bytes: int) -> str:
    return f"{num_bytes / GB:,.2f} GB"


def _lines(plan: MemoryPlan) -> Iterator[str]:
    """A table per sort of rank, then what is left."""
    sorts: dict[tuple[tuple[str, int], ...], list[RankMemory]] = {}
    for rank in plan.ranks:
        sorts.setdefault(tuple(rank.parts().items()), []).append(rank)
    for alike in sorts.values():
        first, last, num_ranks = alike[0], alike[-1], len(alike)
        yield (
            f"{num_ranks} ranks, {first.world_rank} to {last.world_rank}:"
            if num_ranks > 1
            else (f"rank {first.world_rank}:")
        )
        yield from (f"  {name:14} {gb(value):>12}" for name, value in first.parts().items())
        yield f"  {'together':14} {gb(first.fixed_bytes):>12}; {gb(first.read_bytes)} are read from files"
    if plan.device_bytes is None or plan.num_pages is None:
        yield "pages: not known, since nodes.device_bytes is not given"
        return
    contexts = plan.num_pages * plan.page_tokens / plan.max_positions
    yield (
        f"{gb(plan.device_bytes)} leave {plan.num_pages:,} pages of {plan.fullest.page_bytes:,} bytes: "
        f"{plan.num_tokens:,} tokens a lane, {contexts:.1f} times the longest context"
    )
