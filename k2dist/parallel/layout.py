"""Which rank does what: a table, so that losing, adding or moving ranks and experts is a new table.

    world rank   lane  tp rank   experts[moe layer][slot]
        0         0       0      (0, 1, 2), (0, 1, 2), ...
        1         0       1      (3, 4, 5), (3, 4, 5), ...
        2         1       0      (6, 7, 8), (6, 7, 8), ...
        3         -       -      (9, 10, 11), ...             holds experts, serves no lane

`check_layout` says whether a table can work. It is the only judge: what made the table does not matter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from k2dist.config.architecture import Architecture
from k2dist.errors import LayoutError
from k2dist.ids import ExpertId, LaneId, TpRank, WorldRank
from k2dist.messages import Message


class RankPlace(Message, frozen=True, kw_only=True):
    """One rank's row of the table. `lane` and `tp_rank` are both None or both given."""

    world_rank: WorldRank
    lane: LaneId | None
    tp_rank: TpRank | None
    experts: tuple[tuple[ExpertId, ...], ...]  # [moe layer, from 0][slot]; a rank may hold none


class Layout(Message, frozen=True, kw_only=True):
    """The table: `ranks[w].world_rank == w`."""

    tp: int
    ranks: tuple[RankPlace, ...]

    @property
    def world_size(self) -> int:
        return len(self.ranks)

    @property
    def num_lanes(self) -> int:
        return len({rank.lane for rank in self.ranks if rank.lane is not None})

    def members(self, lane: int) -> tuple[WorldRank, ...]:
        """The lane's world ranks in tp_rank order; the first one schedules."""
        found = [(rank.tp_rank, rank.world_rank) for rank in self.ranks if rank.lane == lane]
        return tuple(world_rank for _, world_rank in sorted(found, key=lambda pair: pair[0] or 0))

    def place(self, world_rank: int) -> RankPlace:
        return self.ranks[world_rank]


def check_layout(architecture: Architecture, layout: Layout) -> None:
    """Raise `LayoutError` unless this table can serve this model: all faults at once, with arithmetic."""
    faults = [
        *_tp_faults(architecture, layout.tp),
        *_lane_faults(layout),
        *_expert_faults(architecture, layout),
    ]
    if faults:
        raise LayoutError("\n".join(faults))


def legal_tp(architecture: Architecture) -> tuple[int, ...]:
    """Every tp that cuts neither a head nor a scale block of this model, ascending."""
    return tuple(tp for tp in range(1, architecture.num_heads + 1) if not any(_misfits(architecture, tp)))


def _tp_faults(architecture: Architecture, tp: int) -> Iterator[str]:
    if tp < 1:
        yield f"tp={tp}: must be at least 1"
        return
    misfits = list(_misfits(architecture, tp))
    if misfits:
        legal = legal_tp(architecture)
        nearest = [t for t in legal if t < tp][-1:] + [t for t in legal if t > tp][:1]
        yield f"tp={tp}: {'; '.join(misfits)}; use tp={' or '.join(map(str, nearest))}"


def _misfits(architecture: Architecture, tp: int) -> Iterator[str]:
    """Why slices of 1/tp do not fit; nothing when they do."""
    if architecture.vocab_size % tp:
        yield f"vocab_size {architecture.vocab_size} / {tp} is not whole"
    if architecture.num_heads % tp:
        yield f"num_attention_heads {architecture.num_heads} / {tp} is not whole"
        return
    for axis, width in _sliced_widths(architecture):
        if width % tp:
            yield f"{axis}: {width} / {tp} is not whole"
        elif tp > 1 and architecture.scale_block and (width // tp) % architecture.scale_block:
            yield f"{axis}: {width} / {tp} = {width // tp} cuts a {architecture.scale_block}-block"


def _sliced_widths(architecture: Architecture) -> Iterator[tuple[str, int]]:
    heads = architecture.num_heads
    yield "q_b_proj rows", heads * architecture.qk_head_dim
    yield "kv_b_proj rows", heads * (architecture.qk_nope_head_dim + architecture.v_head_dim)
    yield "o_proj columns", heads * architecture.v_head_dim
    if architecture.first_dense_layers:
        yield "intermediate_size", architecture.intermediate_size


def _lane_faults(layout: Layout) -> Iterator[str]:
    for index, rank in enumerate(layout.ranks):
        if rank.world_rank != index:
            yield f"ranks[{index}].world_rank={rank.world_rank}: rows must be in order of world_rank, from 0"
        if (rank.lane is None) != (rank.tp_rank is None):
            yield f"rank {index}: lane={rank.lane} and tp_rank={rank.tp_rank}: give both or neither"
    lanes = {rank.lane for rank in layout.ranks if rank.lane is not None}
    if lanes != set(range(max(len(lanes), 1))):
        yield f"lanes {sorted(lanes)}: there must be at least one, numbered from 0 without a gap"
    for lane in sorted(lanes):
        tp_ranks = sorted(
            rank.tp_rank for rank in layout.ranks if rank.lane == lane and rank.tp_rank is not None
        )
        if tp_ranks != list(range(layout.tp)):
            yield f"lane {lane} has tp ranks {tp_ranks}: tp={layout.tp} needs each below {layout.tp} once"


def _expert_faults(architecture: Architecture, layout: Layout) -> Iterator[str]:
    num_experts, num_layers = architecture.num_experts, architecture.num_moe_layers
    if num_layers and layout.world_size > num_experts:
        yield (
            f"{layout.world_size} ranks for {num_experts} experts: at most one rank per expert, "
            f"so use {num_experts} ranks or fewer (lanes x tp + expert_only_ranks)"
        )
    for rank in layout.ranks:
        yield from _rank_expert_faults(rank, num_experts, num_layers)
    for layer in range(num_layers):
        rows = (rank.experts[layer] for rank in layout.ranks if layer < len(rank.experts))
        homeless = set(range(num_experts)).difference(*rows)
        if homeless:
            yield f"moe layer {layer}: {_some(homeless)} on no rank; every expert needs a slot"


def _rank_expert_faults(rank: RankPlace, num_experts: int, num_layers: int) -> Iterator[str]:
    where = f"rank {rank.world_rank}"
    if len(rank.experts) != num_layers:
        yield f"{where} lists experts for {len(rank.experts)} moe layers, the model has {num_layers}"
    if rank.lane is None and not any(rank.experts):
        yield f"{where} has neither a lane nor an expert: leave it out"
    for layer, experts in enumerate(rank.experts):
        strange = {expert for expert in experts if not 0 <= expert < num_experts}
        if strange:
            yield f"{where}, moe layer {layer}: {_some(strange)} not in 0 .. {num_experts - 1}"
        twice = {expert for expert, count in Counter(experts).items() if count > 1}
        if twice:
            yield f"{where}, moe layer {layer}: {_some(twice)} twice on one rank; put the copy elsewhere"


def _some(experts: Iterable[int]) -> str:
    """Name a few experts of a set that may be all 384."""
    listed = sorted(experts)
    shown = ", ".join(map(str, listed[:5]))
    return f"expert {shown}" if len(listed) <= 5 else f"expert {shown} and {len(listed) - 5} more"
