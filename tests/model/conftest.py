"""A world of rank threads that runs batches through `decoder.forward`, and small architectures for it."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
from k2kernels import KernelSet
from k2kernels.native import NoNativeKernelsError
from torch import Tensor

from k2dist.checkpoint import publish, random_tensors
from k2dist.comm import Alone, Communicator, Exchange, thread_world
from k2dist.config import Architecture, Yarn
from k2dist.ids import LaneId
from k2dist.model import decoder
from k2dist.model.batch import Batch, PromptSegment
from k2dist.model.latent_cache import LatentCache
from k2dist.model.weights import Weights, assemble
from k2dist.parallel import Layout, RankPlace, expert_homes, first_layout, shard_plan

PAGE_TOKENS = 16
KERNELS = ("float32", "bfloat16", "native")


def small_architecture(**changes: object) -> Architecture:
    """K2's awkward bits at small widths; legal up to tp 4 with scale blocks of 16."""
    values: dict[str, object] = {
        "model_type": "kimi_k2",
        "hidden_size": 64,
        "num_layers": 3,
        "num_heads": 8,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,  # kv_a has 40 rows: ragged in blocks of 16
        "v_head_dim": 16,
        "intermediate_size": 128,
        "moe_intermediate_size": 32,
        "num_experts": 12,
        "num_shared_experts": 1,
        "top_k": 3,
        "first_dense_layers": 1,
        "num_groups": 1,
        "top_k_groups": 1,
        "norm_top_k": True,
        "routed_scale": 2.827,
        "rms_norm_eps": 1e-6,
        "rope_theta": 50000.0,
        "yarn": yarn(32.0),
        "max_positions": 4096,
        "vocab_size": 128,
        "bos_token_id": 0,
        "eos_token_ids": (1,),
        "scale_block": 16,
    }
    return Architecture(**{**values, **changes})  # type: ignore[arg-type]


def yarn(factor: float, beta_fast: float = 1.0) -> Yarn:
    return Yarn(
        factor=factor,
        original_max_positions=64,
        beta_fast=beta_fast,
        beta_slow=1.0,
        mscale=1.0,
        mscale_all_dim=1.0,
    )


@dataclass
class Tokens:
    """One sequence: all its tokens, how many of them are prompt, and the pages it may use."""

    tokens: list[int]
    prompt_len: int
    pages: list[int]


@dataclass
class Grant:
    """Compute positions [start, stop) of a sequence; logits are wanted for all of them."""

    sequence: Tokens
    start: int
    stop: int


def make_batch(grants: Sequence[Grant], tp: int, shuffle: random.Random | None = None) -> Batch:
    """Samples follow the grants' order; rows do too, unless shuffled (then row shares are uneven as well)."""
    units: list[tuple[int, Grant]] = []  # (number of the first sample, rows that stay together)
    count = 0
    for grant in grants:
        if grant.start < grant.sequence.prompt_len:
            assert grant.stop <= grant.sequence.prompt_len
            units.append((count, grant))
        else:
            units += [
                (count + i, Grant(grant.sequence, p, p + 1))
                for i, p in enumerate(range(grant.start, grant.stop))
            ]
        count += grant.stop - grant.start
    if shuffle is not None:
        shuffle.shuffle(units)
    return _batch_of(units, tp, shuffle)


def _batch_of(units: list[tuple[int, Grant]], tp: int, shuffle: random.Random | None) -> Batch:
    tokens: list[int] = []
    positions: list[int] = []
    writes: list[int] = []
    prompts: list[PromptSegment] = []
    decodes: list[tuple[int, Grant]] = []
    sample_row: dict[int, int] = {}
    for first_sample, grant in units:
        sequence, row = grant.sequence, len(tokens)
        if grant.start < sequence.prompt_len:
            prompts.append(
                PromptSegment(row, grant.stop - grant.start, grant.start, torch.tensor(sequence.pages))
            )
        else:
            decodes.append((row, grant))
        for i, position in enumerate(range(grant.start, grant.stop)):
            sample_row[first_sample + i] = row + i
            tokens.append(sequence.tokens[position])
            positions.append(position)
            writes.append(sequence.pages[position // PAGE_TOKENS] * PAGE_TOKENS + position % PAGE_TOKENS)
    longest = max((len(grant.sequence.pages) for _, grant in decodes), default=0)
    table = [grant.sequence.pages + [0] * (longest - len(grant.sequence.pages)) for _, grant in decodes]
    batch = Batch(
        token_T=torch.tensor(tokens, dtype=torch.int64),
        position_T=torch.tensor(positions, dtype=torch.int64),
        write_T=torch.tensor(writes, dtype=torch.int64),
        shares=_shares(len(tokens), tp, shuffle),
        prompts=tuple(prompts),
        decode_row_R=torch.tensor([row for row, _ in decodes], dtype=torch.int64),
        decode_length_R=torch.tensor([grant.stop for _, grant in decodes], dtype=torch.int64),
        decode_page_RP=torch.tensor(table, dtype=torch.int64).reshape(len(decodes), longest),
        sample_S=torch.tensor([sample_row[i] for i in range(len(sample_row))], dtype=torch.int64),
    )
    batch.check()
    return batch


def _shares(num_rows: int, tp: int, shuffle: random.Random | None) -> tuple[int, ...]:
    if shuffle is None:
        return tuple(num_rows // tp + (rank < num_rows % tp) for rank in range(tp))
    cuts = sorted(shuffle.randint(0, num_rows) for _ in range(tp - 1))
    return tuple(b - a for a, b in zip([0, *cuts], [*cuts, num_rows], strict=True))


@dataclass
class Rank:
    """One rank of a world, on threads or in a process of its own."""

    architecture: Architecture
    layout: Layout
    place: RankPlace
    kernels: KernelSet
    weights: Weights
    cache: LatentCache | None
    lane: Communicator | None
    exchange: Exchange

    @classmethod
    def open(
        cls,
        architecture: Architecture,
        published: Mapping[str, Tensor],
        layout: Layout,
        world_rank: int,
        world: Communicator,
        lane: Communicator | None,
        kernels: KernelSet,
        num_pages: int = 64,
    ) -> Rank:
        place, cache = layout.place(world_rank), None
        if place.lane is not None:
            cache = LatentCache.allocate(architecture, num_pages, PAGE_TOKENS, kernels)
            for layer in cache.layers:
                layer.fill_(torch.nan)  # what was not written must not be read
        cut = cut_for(published, architecture, layout, world_rank)
        weights = assemble(cut, architecture, place, layout.tp, kernels)
        homes = [
            expert_homes(layout, layer, place.world_rank) for layer in range(architecture.num_moe_layers)
        ]
        exchange = Exchange(world, homes)
        return cls(architecture, layout, place, kernels, weights, cache, lane, exchange)

    def step(self, batches: Mapping[int, Batch], observer: decoder.Observer | None = None) -> Tensor:
        batch = Batch.empty(self.layout.tp)
        if self.place.lane is not None:
            batch = batches.get(self.place.lane, batch)
        with torch.inference_mode():
            return decoder.forward(
                batch,
                self.weights,
                self.cache,
                self.lane,
                self.exchange,
                self.architecture,
                self.kernels,
                observer,
            )


@dataclass
class World:
    """Ranks as threads. `step` runs one batch per lane (absent: idle) and gives each lane's logits."""

    layout: Layout
    ranks: list[Rank]

    def step(
        self, batches: Mapping[int, Batch], observer: decoder.Observer | None = None
    ) -> dict[int, Tensor]:
        def run(world_rank: int) -> Tensor:
            return self.ranks[world_rank].step(batches, observer)

        with ThreadPoolExecutor(len(self.ranks)) as pool:
            return self._lane_logits(list(pool.map(run, range(len(self.ranks)))))

    def _lane_logits(self, results: list[Tensor]) -> dict[int, Tensor]:
        logits: dict[int, Tensor] = {}
        for lane in range(self.layout.num_lanes):
            members = [results[w] for w in self.layout.members(LaneId(lane))]
            assert all(torch.equal(member, members[0]) for member in members), "tp ranks differ"
            logits[lane] = members[0]
        return logits


def open_world(
    architecture: Architecture,
    published: Mapping[str, Tensor],
    layout: Layout | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    kernels: KernelSet | None = None,
    num_pages: int = 64,
) -> World:
    """`kernels`: the reference for `dtype` unless said."""
    kernels = kernels or KernelSet.reference(dtype)
    layout = layout or first_layout(architecture, lanes=1, tp=1)
    comms = thread_world(layout.world_size, 30.0) if layout.world_size > 1 else [Alone()]
    lanes: dict[int, Communicator] = {}
    for lane in range(layout.num_lanes):
        members = layout.members(LaneId(lane))
        lanes |= zip(
            members, thread_world(len(members), 30.0) if len(members) > 1 else [Alone()], strict=True
        )
    ranks = [
        Rank.open(architecture, published, layout, w, comm, lanes.get(w), kernels, num_pages)
        for w, comm in enumerate(comms)
    ]
    return World(layout, ranks)


def cut_for(
    published: Mapping[str, Tensor], architecture: Architecture, layout: Layout, world_rank: int
) -> dict[str, Tensor]:
    """What the shard loader gives this rank."""
    tensors: dict[str, Tensor] = {}
    for read in shard_plan(architecture, layout, world_rank).reads:
        rows = published[read.name][read.row_start : read.row_stop]
        tensors[read.name] = rows[:, read.col_start : read.col_stop] if rows.dim() == 2 else rows
    return tensors


def random_sequence(
    architecture: Architecture, num_tokens: int, prompt_len: int, first_page: int, rng: random.Random
) -> Tokens:
    """Its pages are a shuffled run from `first_page` on."""
    pages = list(range(first_page, first_page + -(-num_tokens // PAGE_TOKENS)))
    rng.shuffle(pages)
    return Tokens([rng.randrange(architecture.vocab_size) for _ in range(num_tokens)], prompt_len, pages)


def kernels_named(name: str) -> KernelSet:
    """The reference for "float32" and "bfloat16", or "native"; skips where this machine has none."""
    if name != "native":
        return KernelSet.reference({"float32": torch.float32, "bfloat16": torch.bfloat16}[name])
    try:
        return KernelSet.native()
    except NoNativeKernelsError as error:
        pytest.skip(str(error))


@pytest.fixture(params=KERNELS)
def kernels(request: pytest.FixtureRequest) -> KernelSet:
    return kernels_named(request.param)


class Rig:
    """What tests of this folder use; a conftest cannot be imported."""

    architecture = staticmethod(small_architecture)
    yarn = staticmethod(yarn)
    batch = staticmethod(make_batch)
    world = staticmethod(open_world)
    sequence = staticmethod(random_sequence)
    kernels = staticmethod(kernels_named)
    grant = Grant
    cut_for = staticmethod(cut_for)
    rank = Rank

    @staticmethod
    def sampling(batch: Batch, row_S: Tensor) -> Batch:
        return dataclasses.replace(batch, sample_S=row_S)

    @staticmethod
    def published(architecture: Architecture, seed: int = 1) -> dict[str, Tensor]:
        return publish(architecture, random_tensors(architecture, seed))


@pytest.fixture(scope="session")
def rig() -> Rig:
    return Rig()
