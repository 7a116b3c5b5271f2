"""What recorded steps take is planned as the engine takes it: spare pages, static batches, own tensors."""

from __future__ import annotations

import pytest
import torch
from k2kernels import KernelSet
from msgspec.structs import replace

from k2dist.config import Architecture
from k2dist.engine.static_batch import StaticRoom
from k2dist.model.latent_cache import LatentCache
from k2dist.parallel import first_layout
from k2dist.parallel.buckets import Bucket, buckets, spare_places
from k2dist.planner import plan_memory
from k2dist.planner.assumptions import ASSUMED
from k2dist.planner.buffers import STATIC_COPIES
from k2dist.planner.terms import Terms, triton_form

META = torch.device("meta")
TERMS = Terms(
    form=triton_form(),
    page_tokens=64,
    step_tokens=4096,
    max_samples=256,
    reserve_bytes=0,
    device_bytes=150_000_000_000,
)


def recorded(*sizes: Bucket) -> Terms:
    return replace(TERMS, recorded=sizes)


@pytest.mark.parametrize("rows", [1, 63, 64, 256])
def test_spare_pages_are_those_of_the_cache(k2: Architecture, rows: int) -> None:
    layout = first_layout(k2, lanes=16, tp=1)
    rank = plan_memory(k2, layout, recorded(Bucket(rows, 16))).ranks[0]
    cache = LatentCache.allocate(k2, 10, 64, KernelSet.triton(), META, num_spare=spare_places(rows))
    assert rank.spare == cache.num_bytes - 10 * rank.page_bytes > 0
    assert rank.parts()["spare pages"] == rank.spare


def test_a_static_room_is_no_larger_than_planned(k2: Architecture) -> None:
    most = Bucket(256, 2048)
    room = StaticRoom(most, k2.hidden_size, torch.bfloat16, META)
    held = [room.buffer, *(staged._there for staged in room.staging._turns), room.hidden_BD]
    assert len(held) == STATIC_COPIES + 1
    layout = first_layout(k2, lanes=16, tp=1)
    small, large = (
        plan_memory(k2, layout, recorded(bucket)).ranks[0].graphs for bucket in (Bucket(256, 1), most)
    )
    numbers = sum(x.nbytes for x in held[:-1])
    assert large - small == numbers - STATIC_COPIES * 8 * Bucket(256, 1).num_ints
    assert small > room.hidden_BD.nbytes


def test_each_size_is_a_graph_and_only_the_largest_has_tensors(k2: Architecture) -> None:
    layout = first_layout(k2, lanes=16, tp=1)
    sizes = buckets(256, 2048)
    one, all_of = (plan_memory(k2, layout, recorded(*some)).ranks[0] for some in (sizes[:1], sizes))
    assert len(sizes) == 70
    assert all_of.graphs - one.graphs == 69 * ASSUMED.graph_bytes
    nothing = plan_memory(k2, layout, TERMS).ranks[0]
    assert (nothing.graphs, nothing.spare) == (0, 0)
    assert all_of.fixed_bytes - nothing.fixed_bytes == all_of.graphs + all_of.spare
    tensors = one.graphs - ASSUMED.graph_bytes
    assert tensors < nothing.activations + nothing.exchange, "of 256 rows, where other steps have 4,096"


def test_a_rank_without_a_lane_has_no_spare_pages(k2: Architecture) -> None:
    layout = first_layout(k2, lanes=12, tp=1, expert_only_ranks=4)
    ranks = plan_memory(k2, layout, recorded(Bucket(256, 2048))).ranks
    assert (ranks[0].spare > 0, ranks[15].spare) == (True, 0)
    assert 0 < ranks[15].graphs < ranks[0].graphs
