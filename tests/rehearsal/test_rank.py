"""A rehearsed rank computes what a real one does, and moves as many bytes, in the same calls."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from typing import TYPE_CHECKING

import pytest
import torch
from k2kernels import KernelSet
from torch import Tensor

from k2dist.checkpoint import RandomShard
from k2dist.comm import Alone, Communicator, Exchange, thread_group, thread_world
from k2dist.config import Architecture
from k2dist.engine.sequences import Sequences
from k2dist.engine.shares import even_shares
from k2dist.ids import LaneId
from k2dist.model import decoder
from k2dist.model.weights import Weights, assemble
from k2dist.parallel import Layout, expert_homes, first_layout, shard_plan
from k2dist.planner import Terms, plan_memory, reference_form
from k2dist.planner.work import Part
from k2dist.rehearsal.load import Load
from k2dist.rehearsal.memory import held_bytes
from k2dist.rehearsal.rank import made_up_cache, made_up_weights

if TYPE_CHECKING:
    from tests.rehearsal.conftest import MakeRank

CPU, PAGE_TOKENS = torch.device("cpu"), 16
KERNELS = KernelSet.reference()
LOAD = Load(decode=3, context=20, prompt_tokens=18, num_steps=3)
LAYOUTS = [(1, 1, 0), (2, 2, 0), (2, 1, 1), (1, 2, 3)]


def leaves(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [leaf for child in value for leaf in leaves(child)]
    if dataclasses.is_dataclass(value):
        return [leaf for field in dataclasses.fields(value) for leaf in leaves(getattr(value, field.name))]
    return []


def whole_weights(architecture: Architecture, layout: Layout, rank: int) -> Weights:
    """By `assemble`, as a rank lays out what it has read."""
    tensors = RandomShard(architecture.scale_block, CPU).tensors(shard_plan(architecture, layout, rank).reads)
    return assemble(tensors, architecture, layout.place(rank), layout.tp, KERNELS)


@pytest.mark.parametrize(("lanes", "tp", "expert_only_ranks"), LAYOUTS)
def test_weights_made_layer_by_layer_are_those_of_assemble(
    tiny: Architecture, lanes: int, tp: int, expert_only_ranks: int
) -> None:
    layout = first_layout(tiny, lanes=lanes, tp=tp, expert_only_ranks=expert_only_ranks)
    for rank in range(layout.world_size):
        made = leaves(made_up_weights(tiny, layout, rank, KERNELS, RandomShard(tiny.scale_block, CPU)))
        whole = leaves(whole_weights(tiny, layout, rank))
        assert len(made) == len(whole)
        assert all(torch.equal(a, b) for a, b in zip(made, whole, strict=True))


def test_a_world_of_one_is_the_real_forward_pass(tiny: Architecture, make_rank: MakeRank) -> None:
    """Three steps, prompts and decoding together: the same hidden rows, bit for bit, and the same cache."""
    layout = first_layout(tiny, lanes=1, tp=1)
    rehearsed = make_rank(layout, 0, LOAD)
    weights = whole_weights(tiny, layout, 0)
    cache = made_up_cache(
        tiny, LOAD.num_pages(PAGE_TOKENS), PAGE_TOKENS, KERNELS, RandomShard(tiny.scale_block, CPU), CPU
    )
    homes = [expert_homes(layout, layer, layout.place(0).world_rank) for layer in range(tiny.num_moe_layers)]
    exchange, sequences = Exchange(Alone(), homes), Sequences(PAGE_TOKENS, 1)
    own = Sequences(PAGE_TOKENS, 1)
    rehearsed._sequences = own
    with torch.inference_mode():
        for plan in LOAD.plans(PAGE_TOKENS, tiny.vocab_size):
            for side in (sequences, own):
                side.apply(plan)
            batch = sequences.batch(plan)
            batch.check()
            expected = decoder.hidden(batch, weights, cache, Alone(), exchange, tiny, KERNELS)
            assert torch.equal(rehearsed.forward(plan), expected)
            for grant in plan.grants:
                for side in (sequences, own):
                    side.append(grant.seq_id, 7)
    assert rehearsed.cache is not None
    assert all(torch.equal(a, b) for a, b in zip(rehearsed.cache.layers, cache.layers, strict=True))


Call = tuple[str, torch.dtype | None, int, tuple[int, ...], tuple[int, ...]]


class Recorded:
    """A communicator that notes its calls: name, dtype, columns, counts out, counts in."""

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm
        self.calls: list[Call] = []
        self.rank, self.size, self.is_on_stream = comm.rank, comm.size, comm.is_on_stream

    def settle(self) -> None:
        self._comm.settle()

    def all_to_all_rows(self, x: Tensor, send: Sequence[int], recv: Sequence[int]) -> Tensor:
        self.calls.append(("all_to_all_rows", x.dtype, x.shape[1], tuple(send), tuple(recv)))
        return self._comm.all_to_all_rows(x, send, recv)

    def reduce_rows(self, x: Tensor, shares: Sequence[int], dtype: torch.dtype) -> Tensor:
        self.calls.append(("reduce_rows", dtype, x.shape[1], tuple(shares), ()))
        return self._comm.reduce_rows(x, shares, dtype)

    def gather_rows(self, x: Tensor, shares: Sequence[int]) -> Tensor:
        self.calls.append(("gather_rows", x.dtype, x.shape[1], tuple(shares), ()))
        return self._comm.gather_rows(x, shares)

    def exchange_ints(self, row: Sequence[int]) -> list[list[int]]:
        return self._comm.exchange_ints(row)

    def broadcast_bytes(self, data: bytes | None, source: int) -> bytes:
        return self._comm.broadcast_bytes(data, source)

    def fence(self) -> None:
        self._comm.fence()


def real_calls(architecture: Architecture, layout: Layout) -> tuple[list[list[Call]], list[list[Call]]]:
    """Of one step of all ranks, as threads: each rank's calls on its world and on its lane."""
    worlds = [Recorded(comm) for comm in thread_world(layout.world_size, 60.0)]
    lanes: dict[int, Recorded] = {}
    for lane in range(layout.num_lanes):
        members = layout.members(LaneId(lane))
        lanes |= {m: Recorded(comm) for m, comm in zip(members, thread_group(members, 60.0), strict=True)}

    def rank_main(world: Recorded) -> None:
        rank = world.rank
        shard = RandomShard(architecture.scale_block, CPU)
        homes = [
            expert_homes(layout, layer, layout.place(rank).world_rank)
            for layer in range(architecture.num_moe_layers)
        ]
        cache = made_up_cache(architecture, LOAD.num_pages(PAGE_TOKENS), PAGE_TOKENS, KERNELS, shard, CPU)
        sequences = Sequences(PAGE_TOKENS, layout.tp)
        plan = next(LOAD.plans(PAGE_TOKENS, architecture.vocab_size))
        if rank in lanes:
            sequences.apply(plan)
        batch = sequences.batch(plan) if rank in lanes else decoder.Batch.empty(layout.tp)
        weights = whole_weights(architecture, layout, rank)
        exchange = Exchange(world, homes)
        with torch.inference_mode():
            decoder.hidden(batch, weights, cache, lanes.get(rank), exchange, architecture, KERNELS)

    with ThreadPoolExecutor(layout.world_size) as pool:
        list(pool.map(rank_main, worlds))
    return [world.calls for world in worlds], [
        lanes[rank].calls if rank in lanes else [] for rank in range(layout.world_size)
    ]


@pytest.mark.parametrize(("lanes", "tp", "expert_only_ranks"), LAYOUTS[1:])
def test_each_rank_makes_the_calls_of_the_real_one(
    tiny: Architecture,
    make_rank: MakeRank,
    monkeypatch: pytest.MonkeyPatch,
    lanes: int,
    tp: int,
    expert_only_ranks: int,
) -> None:
    """Lane: the same calls of the same rows and bytes. World: the same calls and bytes of a row; how many
    rows is the router's affair."""
    layout = first_layout(tiny, lanes=lanes, tp=tp, expert_only_ranks=expert_only_ranks)
    world_calls, lane_calls = real_calls(tiny, layout)
    for rank in range(layout.world_size):
        rehearsed = make_rank(layout, rank, LOAD)
        world = Recorded(rehearsed.world)
        world._comm = copy(rehearsed.world)
        monkeypatch.setattr(rehearsed.world, "all_to_all_rows", world.all_to_all_rows)
        lane = None if rehearsed.lane is None else Recorded(rehearsed.lane)
        rehearsed.lane = lane  # type: ignore[assignment]
        plan = next(LOAD.plans(PAGE_TOKENS, tiny.vocab_size))
        if lane is not None:
            rehearsed._sequences.apply(plan)
        with torch.inference_mode():
            rehearsed.forward(plan if lane is not None else type(plan)(generation=plan.generation, step=0))
        assert [call[:3] for call in world.calls] == [call[:3] for call in world_calls[rank]]
        assert (lane.calls if lane is not None else []) == lane_calls[rank]
        own = even_shares(LOAD.num_rows, tp)[layout.place(rank).tp_rank or 0]
        assert all(sum(call[3]) <= own * tiny.top_k * layout.world_size for call in world.calls[1::3])


@pytest.mark.parametrize(("lanes", "tp", "expert_only_ranks"), LAYOUTS)
def test_it_holds_the_bytes_that_the_plan_says(
    tiny: Architecture, make_rank: MakeRank, lanes: int, tp: int, expert_only_ranks: int
) -> None:
    layout = first_layout(tiny, lanes=lanes, tp=tp, expert_only_ranks=expert_only_ranks)
    terms = Terms(
        form=reference_form(),
        page_tokens=PAGE_TOKENS,
        step_tokens=LOAD.num_rows,
        max_samples=LOAD.num_samples,
        reserve_bytes=0,
        device_bytes=None,
    )
    for planned in plan_memory(tiny, layout, terms).ranks:
        rehearsed = make_rank(layout, planned.world_rank, LOAD)
        assert held_bytes(rehearsed.weights) == planned.weight_bytes
        cache_bytes = 0 if rehearsed.cache is None else rehearsed.cache.num_bytes
        assert cache_bytes == LOAD.num_pages(PAGE_TOKENS) * planned.page_bytes


@pytest.mark.parametrize(("lanes", "tp", "expert_only_ranks"), LAYOUTS)
def test_every_rank_steps_and_every_part_that_it_has_takes_time(
    tiny: Architecture, make_rank: MakeRank, lanes: int, tp: int, expert_only_ranks: int
) -> None:
    layout = first_layout(tiny, lanes=lanes, tp=tp, expert_only_ranks=expert_only_ranks)
    for rank in range(layout.world_size):
        rehearsed = make_rank(layout, rank, LOAD)
        with torch.inference_mode():
            for _ in range(LOAD.num_steps):
                times = rehearsed.step()
        of_experts = {Part.HOST, Part.DISPATCH, Part.EXPERTS, Part.COMBINE}
        expected = set(Part) if rehearsed.lane is not None else of_experts
        assert {part for part, spent_s in times.parts.items() if spent_s > 0} == expected
        traffic = rehearsed.exchange.take_traffic()
        assert len(traffic) == LOAD.num_steps * tiny.num_moe_layers
        assert all(layer.slots_hit <= layer.pairs for layer in traffic)


def test_a_rehearsal_repeats_itself(tiny: Architecture, make_rank: MakeRank) -> None:
    layout = first_layout(tiny, lanes=2, tp=2)
    seen = []
    for _ in range(2):
        rehearsed = make_rank(layout, 1, LOAD)
        with torch.inference_mode():
            rehearsed.step()
        assert rehearsed.cache is not None
        seen.append(([layer.clone() for layer in rehearsed.cache.layers], rehearsed.exchange.take_traffic()))
    assert seen[0][1] == seen[1][1]
    assert all(torch.equal(a, b) for a, b in zip(seen[0][0], seen[1][0], strict=True))
