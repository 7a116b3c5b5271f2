"""The first layers of a model as a model of its own, for a device that has no room for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from msgspec.structs import replace

from k2dist.config.architecture import Architecture
from k2dist.messages import Message
from k2dist.parallel import Layout, TensorRead, shard_plan
from k2dist.planner.memory import plan_memory
from k2dist.planner.rank_memory import RankMemory
from k2dist.planner.terms import Terms

EMBEDDING = "model.embed_tokens.weight"


class LayerFit(Message, frozen=True, kw_only=True):
    """A rank with the first `num_layers` layers. `laying_out`: bytes of one layer, or of the head, as
    published: they are there besides what it holds while that is laid out."""

    num_layers: int
    memory: RankMemory
    num_pages: int
    laying_out: int

    @property
    def needed_bytes(self) -> int:
        return self.memory.fixed_bytes + self.num_pages * self.memory.page_bytes + self.laying_out


def first_layers(architecture: Architecture, layout: Layout, num_layers: int) -> tuple[Architecture, Layout]:
    """The model of the first `num_layers`, and the layout's part for it."""
    num_moe_layers = num_layers - architecture.first_dense_layers
    ranks = tuple(replace(rank, experts=rank.experts[:num_moe_layers]) for rank in layout.ranks)
    return replace(architecture, num_layers=num_layers), replace(layout, ranks=ranks)


def fewest_layers(architecture: Architecture) -> int:
    """With a layer of each sort that the model has."""
    return architecture.first_dense_layers + min(architecture.num_moe_layers, 1)


def fit_of(
    architecture: Architecture, layout: Layout, terms: Terms, world_rank: int, num_layers: int, num_pages: int
) -> LayerFit:
    """What `world_rank` needs for the first `num_layers` and `num_pages` of cache (none without a lane)."""
    few, few_layout = first_layers(architecture, layout, num_layers)
    memory = plan_memory(few, few_layout, terms).ranks[world_rank]
    return LayerFit(
        num_layers=num_layers,
        memory=memory,
        num_pages=num_pages if memory.lane is not None else 0,
        laying_out=_laying_out(architecture, layout, world_rank),
    )


@lru_cache(maxsize=1)  # most_layers asks for one rank again and again
def _laying_out(architecture: Architecture, layout: Layout, world_rank: int) -> int:
    few, few_layout = first_layers(architecture, layout, fewest_layers(architecture))
    # The embedding is held as it is published.
    reads = [read for read in shard_plan(few, few_layout, world_rank).reads if read.name != EMBEDDING]
    return max(sum(read.num_bytes for read in part) for part in reads_by_layer(reads).values())


def most_layers(
    architecture: Architecture, layout: Layout, terms: Terms, world_rank: int, num_pages: int, free_bytes: int
) -> LayerFit | None:
    """The most layers, from the first on, that fit into `free_bytes`; None if not even `fewest_layers` do."""

    def fit(num_layers: int) -> LayerFit:
        return fit_of(architecture, layout, terms, world_rank, num_layers, num_pages)

    least, most = fewest_layers(architecture), architecture.num_layers
    best = fit(least)
    if best.needed_bytes > free_bytes:
        return None
    while least < most:
        middle = (least + most + 1) // 2
        tried = fit(middle)
        if tried.needed_bytes <= free_bytes:
            least, best = middle, tried
        else:
            most = middle - 1
    return best


def reads_by_layer(reads: Sequence[TensorRead]) -> dict[int | None, list[TensorRead]]:
    """A shard plan's reads by decoder layer; None: embedding, last norm and head."""
    by_layer: dict[int | None, list[TensorRead]] = {}
    for read in reads:
        parts = read.name.split(".")
        layer = int(parts[2]) if parts[:2] == ["model", "layers"] else None
        by_layer.setdefault(layer, []).append(read)
    return by_layer
