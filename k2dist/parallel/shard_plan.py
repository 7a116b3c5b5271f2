"""Which bytes of a checkpoint one rank reads: pure, so that it is known before anything is loaded.

Every published tensor is read, whole or one slice of it, or skipped with a reason:

    embedding, head           vocabulary rows over tp
    q_b, kv_b                 rows of this rank's heads
    o_proj                    columns of this rank's heads
    dense gate, up | down     rows | columns over tp
    q_a, kv_a, norms, router, shared expert      whole on every rank of a lane
    experts                   whole, on each rank with a slot for them

A scale has its weight's cut, divided by the scale block. A rank without a lane reads experts only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

from k2dist.config.architecture import Architecture
from k2dist.ids import WorldRank
from k2dist.messages import Message
from k2dist.parallel.layout import Layout, RankPlace, check_layout
from k2dist.parallel.published import (
    DTYPE_BYTES,
    Published,
    Share,
    leftover_tensors,
    published_tensors,
)

NO_LANE = "this rank serves no lane"
NO_SLOT = "expert without a slot on this rank"
LEFTOVER = "leftover of training; rotary angles are computed"
MTP = "multi-token prediction layer, not used"


class ByteRuns(NamedTuple):
    """Where a rectangle's bytes lie in its tensor: `num_runs` runs of `run_bytes`, `stride` bytes apart."""

    first: int  # byte of the tensor where the first run begins
    run_bytes: int
    stride: int
    num_runs: int


class TensorRead(Message, frozen=True, kw_only=True):
    """A rectangle of one published tensor: rows [row_start, row_stop), columns [col_start, col_stop).

    A vector is all rows with one column; `shape` is as published, so it has then one entry.
    """

    name: str
    dtype: str  # as in DTYPE_BYTES
    shape: tuple[int, ...]
    row_start: int
    row_stop: int
    col_start: int
    col_stop: int

    @property
    def cut_shape(self) -> tuple[int, ...]:
        """The shape that this rank holds."""
        rows = self.row_stop - self.row_start
        return (rows,) if len(self.shape) == 1 else (rows, self.col_stop - self.col_start)

    @property
    def num_bytes(self) -> int:
        return (self.row_stop - self.row_start) * (self.col_stop - self.col_start) * DTYPE_BYTES[self.dtype]

    @property
    def runs(self) -> ByteRuns:
        """One run where whole rows are read, since they lie one after the other; else a run per row."""
        item = DTYPE_BYTES[self.dtype]
        row_bytes = item if len(self.shape) == 1 else self.shape[1] * item
        run_bytes = (self.col_stop - self.col_start) * item
        first = self.row_start * row_bytes + self.col_start * item
        if run_bytes == row_bytes:
            return ByteRuns(first, self.num_bytes, self.num_bytes, 1)
        return ByteRuns(first, run_bytes, row_bytes, self.row_stop - self.row_start)


class Skip(Message, frozen=True, kw_only=True):
    """A name passed over. A name ending in `*` stands for all with that beginning."""

    name: str
    reason: str
    is_optional: bool = False  # a checkpoint without it is whole too


class ShardPlan(Message, frozen=True, kw_only=True):
    """One rank's part of the checkpoint. No name is in both `reads` and `skips`."""

    world_rank: WorldRank
    reads: tuple[TensorRead, ...]
    skips: tuple[Skip, ...]

    @property
    def num_bytes(self) -> int:
        return sum(read.num_bytes for read in self.reads)


def shard_plan(architecture: Architecture, layout: Layout, world_rank: int) -> ShardPlan:
    """What `world_rank` reads and skips. Raises `LayoutError` if the layout is not legal."""
    check_layout(architecture, layout)
    return _Planner(architecture, layout.tp).plan(layout.place(world_rank))


def shard_plans(architecture: Architecture, layout: Layout) -> Iterator[ShardPlan]:
    """The plans of all ranks, in order. They share what they have in common: 128 ranks of K2 take seconds."""
    check_layout(architecture, layout)
    planner = _Planner(architecture, layout.tp)
    for place in layout.ranks:
        yield planner.plan(place)


class _Planner:
    """Plans of the ranks of one layout. Tensors come in groups of one fate: a lane's, or one expert's."""

    def __init__(self, architecture: Architecture, tp: int) -> None:
        self._first_dense_layers = architecture.first_dense_layers
        runs = groupby(published_tensors(architecture), key=lambda tensor: (tensor.layer, tensor.expert))
        self._groups = [_Group(layer, expert, tuple(tensors), tp) for (layer, expert), tensors in runs]
        self._optional = [
            Skip(name=t.name, reason=LEFTOVER, is_optional=True) for t in leftover_tensors(architecture)
        ]
        for layer in range(architecture.num_layers, architecture.num_layers + architecture.num_mtp_layers):
            self._optional.append(Skip(name=f"model.layers.{layer}.*", reason=MTP, is_optional=True))

    def plan(self, place: RankPlace) -> ShardPlan:
        held = [frozenset(experts) for experts in place.experts]
        reads: list[TensorRead] = []
        skips: list[Skip] = []
        for group in self._groups:
            if group.expert is not None:
                assert group.layer is not None
                if group.expert in held[group.layer - self._first_dense_layers]:
                    reads += group.reads(0)
                else:
                    skips += group.skips(NO_SLOT)
            elif place.tp_rank is not None:
                reads += group.reads(place.tp_rank)
            else:
                skips += group.skips(NO_LANE)
        return ShardPlan(world_rank=place.world_rank, reads=tuple(reads), skips=(*skips, *self._optional))


@dataclass(slots=True)
class _Group:
    """Neighbouring tensors that a rank reads or skips together; each answer is worked out once."""

    layer: int | None
    expert: int | None
    tensors: tuple[Published, ...]
    tp: int
    _reads: dict[int, list[TensorRead]] = field(default_factory=dict)  # by tp rank; experts' under 0
    _skips: list[Skip] = field(default_factory=list)

    def reads(self, tp_rank: int) -> list[TensorRead]:
        if tp_rank not in self._reads:
            self._reads[tp_rank] = [_cut(tensor, tp_rank, self.tp) for tensor in self.tensors]
        return self._reads[tp_rank]

    def skips(self, reason: str) -> list[Skip]:
        if not self._skips:
            self._skips = [Skip(name=tensor.name, reason=reason) for tensor in self.tensors]
        return self._skips


def _cut(tensor: Published, tp_rank: int, tp: int) -> TensorRead:
    """This tp rank's rectangle; `check_layout` made sure that it divides."""
    rows = tensor.shape[0]
    cols = tensor.shape[1] if len(tensor.shape) == 2 else 1
    row_start, row_stop = _part(rows, tp_rank, tp) if tensor.share is Share.ROWS else (0, rows)
    col_start, col_stop = _part(cols, tp_rank, tp) if tensor.share is Share.COLUMNS else (0, cols)
    return TensorRead(
        name=tensor.name,
        dtype=tensor.dtype,
        shape=tensor.shape,
        row_start=row_start,
        row_stop=row_stop,
        col_start=col_start,
        col_stop=col_stop,
    )


def _part(width: int, tp_rank: int, tp: int) -> tuple[int, int]:
    assert width % tp == 0, f"{width} / {tp}"
    return width // tp * tp_rank, width // tp * (tp_rank + 1)
