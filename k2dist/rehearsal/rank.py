"""One rank with nobody round it: made-up weights, cache and peers, and the real code of a step.

What a step does here is what `engine` does, on one thread and with a clock: batch, forward, head, sample,
bookkeeping. The scheduler's plan is written down (`load`), since every sequence decodes in every step.

Legend: T rows of the lane, S rows that sample, D hidden width, P sample rows of peers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from k2kernels import Experts, KernelSet
from torch import Tensor

from k2dist.checkpoint import RandomShard
from k2dist.comm import RehearsalCommunicator, RehearsalWorld
from k2dist.config import Architecture
from k2dist.engine.readout import Readout
from k2dist.engine.sequences import Sequences
from k2dist.engine.shares import even_shares
from k2dist.messages import StepPlan
from k2dist.model import decoder
from k2dist.model.latent_cache import LatentCache
from k2dist.model.sampler import VocabularySlice
from k2dist.model.weights import Layer, Weights, assemble_ends, assemble_layer
from k2dist.parallel import Layout, expert_homes, shard_plan
from k2dist.planner.fewer_layers import reads_by_layer
from k2dist.planner.work import LaneWork, Part
from k2dist.rehearsal.load import Load
from k2dist.rehearsal.parts import StepTimes, Stopwatch, clock_of
from k2dist.rehearsal.peers import made_up_peers
from k2dist.rehearsal.timed import CuttingObserver, TimedExchange, timed_kernels

_SAMPLE_ROWS = 256  # of peers: more than a step of decoding brings, so that none is there twice

Note = Callable[[], None]


class RehearsedRank:
    """`world_rank` of `layout`. Equal arguments give equal steps, bit for bit.

    `note` is called after each layer that is laid out (`architecture.num_layers` times).
    """

    def __init__(
        self,
        architecture: Architecture,
        layout: Layout,
        world_rank: int,
        kernels: KernelSet,
        load: Load,
        *,
        page_tokens: int,
        device: torch.device,
        seed: int = 0,
        note: Note = lambda: None,
    ) -> None:
        self._architecture = architecture
        self._device = device
        self._load = load
        place, self._tp = layout.place(world_rank), layout.tp
        self.stopwatch = Stopwatch(clock_of(device))
        self._kernels = timed_kernels(kernels, self.stopwatch)
        self._observer = CuttingObserver(architecture, self.stopwatch)
        shard = RandomShard(architecture.scale_block, device, seed)
        self.weights = made_up_weights(architecture, layout, world_rank, kernels, shard, note)
        self.cache: LatentCache | None = None
        self.lane: RehearsalCommunicator | None = None
        self.work = LaneWork(num_rows=0, own_rows=0, decode_rows=0, num_keys=0, prompt_rows=0)
        if place.tp_rank is not None:
            num_pages = load.num_pages(page_tokens)
            self.cache = made_up_cache(architecture, num_pages, page_tokens, kernels, shard, device)
            self.lane = RehearsalCommunicator(place.tp_rank, layout.tp, self.stopwatch.aside)
            self.work = load.work(even_shares(load.num_rows, layout.tp)[place.tp_rank])
        peers = made_up_peers(
            layout,
            world_rank,
            num_experts=architecture.num_experts,
            top_k=architecture.top_k,
            lane_rows=load.num_rows,
            skew=load.skew,
            seed=seed,
            device=device,
        )
        sample_PD = shard.normal("peers", (_SAMPLE_ROWS, architecture.hidden_size), kernels.dtype)
        self.world = RehearsalWorld(
            world_rank,
            layout.world_size,
            peers,
            kernels.wire_pack(sample_PD, architecture.scale_block),
            self.stopwatch.aside,
        )
        homes = [
            expert_homes(layout, layer, place.world_rank) for layer in range(architecture.num_moe_layers)
        ]
        self.exchange = TimedExchange(self.world, homes, self.stopwatch, device)
        self._sequences = Sequences(page_tokens, layout.tp)
        self._plans = load.plans(page_tokens, architecture.vocab_size)

    def step(self) -> StepTimes:
        """The next step of the load; at most `load.num_steps`."""
        plan = next(self._plans)
        self.stopwatch.start()
        if self.lane is None:
            self.forward(StepPlan(generation=plan.generation, step=plan.step))
        else:
            self._sequences.apply(plan)
            x_SD = self.forward(plan)
            self.stopwatch.cut(Part.HEAD)
            token_ids = self._sample(x_SD, plan)
            self.stopwatch.cut(Part.SAMPLE)
            sampling = [grant.seq_id for grant in plan.grants if grant.samples]
            for seq_id, token_id in zip(sampling, token_ids, strict=True):
                self._sequences.append(seq_id, token_id)
        self.stopwatch.cut(Part.HOST)
        return self.stopwatch.times_s()

    def forward(self, plan: StepPlan) -> Tensor:
        """The last hidden rows that sample, normed: [S, D]."""
        batch = self._sequences.batch(plan).to(self._device)
        self.stopwatch.cut(Part.HOST)
        return decoder.hidden(
            batch,
            self.weights,
            self.cache,
            self.lane,
            self.exchange,
            self._architecture,
            self._kernels,
            self._observer,
        )

    def _sample(self, x_SD: Tensor, plan: StepPlan) -> tuple[int, ...]:
        assert self.lane is not None, "a rank of a lane samples"
        readout = Readout(
            self._head, VocabularySlice.of(self.lane, self._architecture.vocab_size), frozenset()
        )
        return readout.read(x_SD, self._sequences.row_samplings(plan), ()).sampled.token_ids

    def _head(self, x_SD: Tensor) -> Tensor:
        assert self.weights.lane is not None, "a rank of a lane has a head"
        self.stopwatch.cut(Part.SAMPLE)
        logits_Sv = decoder.head(x_SD, self.weights.lane, self._kernels)
        self.stopwatch.cut(Part.HEAD)
        return logits_Sv


def made_up_weights(
    architecture: Architecture,
    layout: Layout,
    world_rank: int,
    kernels: KernelSet,
    shard: RandomShard,
    note: Note = lambda: None,
) -> Weights:
    """What `assemble` would make of the rank's shard, layer by layer: one is there twice at a time."""
    place, tp = layout.place(world_rank), layout.tp
    reads = reads_by_layer(shard_plan(architecture, layout, world_rank).reads)
    layers: list[Layer] = []
    experts: list[Experts] = []
    for number in range(architecture.num_layers):
        tensors = shard.tensors(reads.get(number, ()))
        layer, layer_experts = assemble_layer(tensors, architecture, place, tp, kernels, number)
        layers += [] if layer is None else [layer]
        experts += [] if layer_experts is None else [layer_experts]
        note()
    if place.tp_rank is None:
        return Weights(None, tuple(experts))
    ends = assemble_ends(shard.tensors(reads[None]), architecture, place.tp_rank, tp, kernels)
    return Weights(replace(ends, layers=tuple(layers)), tuple(experts))


def made_up_cache(
    architecture: Architecture,
    num_pages: int,
    page_tokens: int,
    kernels: KernelSet,
    shard: RandomShard,
    device: torch.device,
    num_spare: int = 0,
) -> LatentCache:
    """Every place written, as after as many tokens."""
    cache = LatentCache.allocate(architecture, num_pages, page_tokens, kernels, device, num_spare=num_spare)
    for number, layer_CD in enumerate(cache.layers):
        layer_CD.copy_(shard.normal(f"cache.{number}", tuple(layer_CD.shape), layer_CD.dtype))
    return cache
