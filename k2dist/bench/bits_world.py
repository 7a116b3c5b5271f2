"""Ranks as threads over gloo, which take the same step in one order after another.

Legend: T rows of a lane's step, R decode rows, S that sample, P pages of one, C cache places, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeVar

import torch
from k2kernels import KernelSet
from torch import Tensor
from torch.distributed import Store  # type: ignore[attr-defined]  # the stubs do not re-export it

from k2dist.bench.fast_orders import CountingLane, LibraryReductions, PreReduced
from k2dist.bench.library_kernels import library_kernels
from k2dist.checkpoint import load_shard
from k2dist.comm import (
    CapacityRule,
    DistCommunicator,
    Exchange,
    PaddedExchange,
    TokenExchange,
    host_store,
    join_store,
)
from k2dist.config import read_architecture
from k2dist.engine.shares import even_shares
from k2dist.ids import Generation
from k2dist.model import decoder
from k2dist.model.batch import Batch, PromptSegment
from k2dist.model.latent_cache import LatentCache
from k2dist.model.weights import assemble
from k2dist.parallel import Layout, expert_homes, shard_plan

PAGE_TOKENS = 64
_ADDRESS = "127.0.0.1"
_DEADLINE_S = 600.0
Group = TypeVar("Group", bound=DistCommunicator)


@dataclass(frozen=True, slots=True)
class Order:
    """What is left to the fastest order; the rest keeps the same bits. Frames keep them too."""

    name: str
    capacity_factor: float | None = None  # of frames in which rows travel; None: exact splits
    kernels: bool = False
    reductions: bool = False
    returns: bool = False


@dataclass(frozen=True, slots=True)
class Sent:
    """Bytes that left this world's ranks for other ranks: reductions of lanes, rows to experts and back."""

    lane_bytes: int
    expert_bytes: int

    def __sub__(self, before: Sent) -> Sent:
        return Sent(self.lane_bytes - before.lane_bytes, self.expert_bytes - before.expert_bytes)


class BitsWorld:
    """Every rank of `layout`, with a cache full of noise. A context: it ends its threads."""

    def __init__(self, model_dir: Path, layout: Layout, kernels: KernelSet, *, num_places: int) -> None:
        store = host_store(_ADDRESS)
        self._pool = ThreadPoolExecutor(layout.world_size)  # a thread for each: they wait for each other
        self._ranks = list(
            self._pool.map(
                lambda world_rank: _Rank(model_dir, layout, world_rank, kernels, store.port, num_places),
                range(layout.world_size),
            )
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def step(self, order: Order, batch: Batch) -> Tensor:
        """`batch` on every lane at once; lane 0's logits of `batch.sample_S`."""
        logits: list[Tensor] = list(self._pool.map(lambda rank: rank.step(order, batch), self._ranks))
        return logits[0]

    def sent(self) -> Sent:
        """Since the start, of all ranks."""
        sent = [rank.sent() for rank in self._ranks]
        return Sent(sum(each.lane_bytes for each in sent), sum(each.expert_bytes for each in sent))


class _Rank:
    """One rank, with each part of a step in both orders."""

    def __init__(
        self, model_dir: Path, layout: Layout, world_rank: int, kernels: KernelSet, port: int, num_places: int
    ) -> None:
        architecture, place = read_architecture(model_dir), layout.place(world_rank)
        tensors = load_shard(model_dir, shard_plan(architecture, layout, world_rank))
        connect = _Connect(join_store(_ADDRESS, port, _DEADLINE_S), world_rank)
        world = connect.group(DistCommunicator, "world", tuple(range(layout.world_size)))
        homes = [
            expert_homes(layout, layer, place.world_rank) for layer in range(architecture.num_moe_layers)
        ]
        self._architecture = architecture
        self._layout = layout
        self._weights = assemble(tensors, architecture, place, layout.tp, kernels)
        self._kernels = kernels
        self._exchange, self._pre_reduced = (
            Exchange(world, homes),
            PreReduced(world, homes, architecture.top_k),
        )
        self._lane: CountingLane | None = None
        self._library_lane: LibraryReductions | None = None
        self._cache: LatentCache | None = None
        if place.lane is not None:
            members = layout.members(place.lane)
            self._lane = connect.group(CountingLane, f"lane {place.lane}", members)
            self._library_lane = connect.group(LibraryReductions, f"library lane {place.lane}", members)
            self._cache = LatentCache.allocate(
                architecture, -(-num_places // PAGE_TOKENS), PAGE_TOKENS, kernels
            )
            for layer_CD in self._cache.layers:
                layer_CD.copy_(torch.randn(layer_CD.shape, generator=torch.Generator().manual_seed(0)))

    def step(self, order: Order, batch: Batch) -> Tensor:
        with torch.inference_mode():
            if order.returns:
                return self._forward(order, batch, self._pre_reduced)
            if order.capacity_factor is None:
                return self._forward(order, batch, self._exchange)
            rule = CapacityRule.of(self._architecture, self._layout, order.capacity_factor)
            padded = PaddedExchange(self._exchange, rule.capacity(max(batch.shares)))
            logits_SV = self._forward(order, batch, padded)
            self._exchange.num_bytes_sent += padded.num_bytes_sent
            return self._forward(order, batch, self._exchange) if padded.has_overflowed() else logits_SV

    def _forward(self, order: Order, batch: Batch, exchange: TokenExchange) -> Tensor:
        return decoder.forward(
            batch if self._lane is not None else Batch.empty(len(batch.shares)),
            self._weights,
            self._cache,
            self._library_lane if order.reductions else self._lane,
            exchange,
            self._architecture,
            self._ordered(order),
        )

    def sent(self) -> Sent:
        lanes = [lane for lane in (self._lane, self._library_lane) if lane is not None]
        return Sent(
            sum(lane.num_bytes_reduced for lane in lanes),
            self._exchange.num_bytes_sent + self._pre_reduced.num_bytes_sent,
        )

    def _ordered(self, order: Order) -> KernelSet:
        kernels = library_kernels(self._kernels) if order.kernels else self._kernels
        return self._pre_reduced.kernels(kernels) if order.returns else kernels


@dataclass(frozen=True, slots=True)
class _Connect:
    """One rank's way into its groups."""

    store: Store
    world_rank: int

    def group(self, kind: type[Group], name: str, members: Sequence[int]) -> Group:
        return kind(
            self.store,
            generation=Generation(0),
            name=name,
            members=members,
            world_rank=self.world_rank,
            address=_ADDRESS,
            deadline_s=_DEADLINE_S,
            join_deadline_s=_DEADLINE_S,
        )


def prompt_batch(num_rows: int, context: int, tp: int, vocab_size: int) -> Batch:
    """A chunk of one prompt, behind `context` cached tokens; the last row samples."""
    position_T = torch.arange(context, context + num_rows)
    pages = torch.arange(-(-(context + num_rows) // PAGE_TOKENS))
    none = torch.empty(0, dtype=torch.int64)
    return Batch(
        token_T=_token_ids(num_rows, vocab_size),
        position_T=position_T,
        write_T=position_T,
        shares=even_shares(num_rows, tp),
        prompts=(PromptSegment(0, num_rows, context, pages),),
        decode_row_R=none,
        decode_length_R=none,
        decode_page_RP=none.view(0, 0),
        sample_S=torch.tensor([num_rows - 1]),
    )


def decode_batch(num_rows: int, context: int, tp: int, vocab_size: int) -> Batch:
    """A row each of so many sequences, behind `context` cached tokens of its own; all sample."""
    pages_each = -(-(context + 1) // PAGE_TOKENS)
    page_RP = torch.arange(num_rows * pages_each).view(num_rows, pages_each)
    row_R = torch.arange(num_rows)
    return Batch(
        token_T=_token_ids(num_rows, vocab_size),
        position_T=torch.full((num_rows,), context),
        write_T=page_RP[:, -1] * PAGE_TOKENS + context % PAGE_TOKENS,
        shares=even_shares(num_rows, tp),
        prompts=(),
        decode_row_R=row_R,
        decode_length_R=torch.full((num_rows,), context + 1),
        decode_page_RP=page_RP,
        sample_S=row_R,
    )


def num_places(num_rows: int, context: int) -> int:
    """Of the cache, for a decode batch."""
    return num_rows * -(-(context + 1) // PAGE_TOKENS) * PAGE_TOKENS


def _token_ids(num_rows: int, vocab_size: int) -> Tensor:
    return torch.randint(vocab_size, (num_rows,), generator=torch.Generator().manual_seed(num_rows))
