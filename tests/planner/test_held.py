"""Planned bytes of weights are those that a rank reads, and those that it then holds."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch
from k2kernels import KernelSet
from k2kernels.native import NoNativeKernelsError, packed
from torch import Tensor

from k2dist.checkpoint import load_shard
from k2dist.config import Architecture, read_architecture
from k2dist.demo import MODEL_DIR
from k2dist.model.latent_cache import LatentCache
from k2dist.model.weights import Mlp, Weights, assemble
from k2dist.parallel import Layout, first_layout, published_tensors, shard_plan
from k2dist.planner import Form, Kind, Terms, kind_of, native_form, plan_memory, reference_form, triton_form
from k2dist.planner.held import PANEL, PLAIN_BLOCK, packed_bytes

DTYPES = {2: torch.bfloat16, 4: torch.float32}


def terms(form: Form) -> Terms:
    return Terms(form=form, page_tokens=16, step_tokens=64, max_samples=8, reserve_bytes=0, device_bytes=None)


@pytest.mark.parametrize("stream_bytes", [2, 4])
@pytest.mark.parametrize(("lanes", "tp", "alone"), [(1, 1, 0), (2, 2, 0), (1, 4, 1)])
def test_what_the_reference_kernels_hold_is_what_was_planned(
    tiny_model_dir: Path, small: Architecture, lanes: int, tp: int, alone: int, stream_bytes: int
) -> None:
    layout = first_layout(small, lanes=lanes, tp=tp, expert_only_ranks=alone)
    plan = plan_memory(small, layout, terms(reference_form(stream_bytes)))
    kernels = KernelSet.reference(DTYPES[stream_bytes])
    for rank in (0, layout.world_size - 1):
        tensors = load_shard(tiny_model_dir, shard_plan(small, layout, rank))
        weights = assemble(tensors, small, layout.place(rank), tp, kernels)
        found = dict.fromkeys(Kind, 0)
        for kind, tensor in held_tensors(weights):
            found[kind] += tensor.untyped_storage().nbytes()
        assert plan.ranks[rank].weights == found


def held_tensors(weights: Weights) -> Iterator[tuple[Kind, Tensor]]:
    """Every tensor of a rank's weights, and what it is for."""
    yield from ((Kind.EXPERTS, tensor) for tensor in tensors_of(weights.experts))
    if weights.lane is None:
        return
    yield Kind.EMBEDDING, weights.lane.embed_vD
    yield from ((Kind.HEAD, tensor) for tensor in tensors_of(weights.lane.head_vD))
    yield Kind.NORMS, weights.lane.norm_D
    for layer in weights.lane.layers:
        norms = [
            layer.attention_norm_D,
            layer.mlp_norm_D,
            layer.attention.q_norm_Q,
            layer.attention.kv_norm_L,
        ]
        yield from ((Kind.NORMS, tensor) for tensor in norms)
        rest = [tensor for tensor in tensors_of(layer.attention) if not any(tensor is norm for norm in norms)]
        yield from ((Kind.ATTENTION, tensor) for tensor in rest)
        if isinstance(layer.mlp, Mlp):
            yield from ((Kind.DENSE, tensor) for tensor in tensors_of(layer.mlp))
        else:
            yield from ((Kind.ROUTER, tensor) for tensor in tensors_of(layer.mlp.router))
            yield from ((Kind.SHARED_EXPERT, tensor) for tensor in tensors_of(layer.mlp.shared))


def tensors_of(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from tensors_of(item)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from tensors_of(getattr(value, field.name))


@pytest.mark.parametrize(("lanes", "tp", "alone"), [(1, 1, 0), (2, 4, 0), (3, 2, 1)])
def test_a_rank_reads_what_its_shard_plan_says(small: Architecture, lanes: int, tp: int, alone: int) -> None:
    layout = first_layout(small, lanes=lanes, tp=tp, expert_only_ranks=alone)
    plan = plan_memory(small, layout, terms(triton_form()))
    for rank in plan.ranks:
        assert rank.read_bytes == shard_plan(small, layout, rank.world_rank).num_bytes


def test_served_weights_stay_as_published_but_for_kv_b_and_the_router(k2: Architecture) -> None:
    (rank,) = plan_memory(k2, single(k2), terms(triton_form())).ranks
    published = dict.fromkeys(Kind, 0)
    for tensor in published_tensors(k2):
        published[kind_of(tensor)] += tensor.num_bytes
    kv_b, kv_b_scales = 61 * 16384 * 512, 61 * 128 * 4 * 4
    assert rank.weights == published | {
        Kind.ATTENTION: published[Kind.ATTENTION] + kv_b - kv_b_scales,  # bfloat16 in place of float8
        Kind.ROUTER: 60 * (384 * 7168 + 384) * 4,
    }


def single(architecture: Architecture) -> Layout:
    return first_layout(architecture, lanes=1, tp=1)


def test_a_page_has_the_bytes_that_a_cache_allocates(small: Architecture) -> None:
    for stream_bytes, dtype in DTYPES.items():
        kernels = KernelSet.reference(dtype)
        plan = plan_memory(small, single(small), terms(triton_form(stream_bytes)))
        cache = LatentCache.allocate(small, num_pages=3, page_tokens=16, kernels=kernels)
        assert cache.num_bytes == 3 * plan.ranks[0].page_bytes


def test_a_token_of_k2_takes_70272_bytes(k2: Architecture) -> None:
    """k2_facts 2.2: 576 values of 2 bytes in each of 61 layers."""
    plan = plan_memory(k2, single(k2), terms(triton_form()))
    assert plan.ranks[0].page_bytes == 16 * 70_272


def test_an_unquantised_model_is_held_as_bfloat16(small: Architecture) -> None:
    plain = msgspec.structs.replace(small, scale_block=None)
    served = plan_memory(plain, single(plain), terms(triton_form())).ranks[0]
    reference = plan_memory(plain, single(plain), terms(reference_form())).ranks[0]
    for kind in (Kind.EXPERTS, Kind.SHARED_EXPERT, Kind.DENSE, Kind.HEAD):
        assert reference.weights[kind] == 2 * served.weights[kind]


@pytest.mark.parametrize(("lanes", "tp", "alone"), [(1, 1, 0), (2, 2, 0), (1, 4, 1)])
def test_what_the_native_kernels_hold_is_what_was_planned(
    tiny_model_dir: Path, small: Architecture, lanes: int, tp: int, alone: int
) -> None:
    native_kernels()
    check_native(tiny_model_dir, first_layout(small, lanes=lanes, tp=tp, expert_only_ranks=alone))


def test_the_demo_model_is_held_as_planned_by_the_kernels_that_serve_it() -> None:
    """At the layout of `k2dist demo`, every kind to the byte."""
    native_kernels()
    demo = read_architecture(MODEL_DIR)
    check_native(MODEL_DIR, first_layout(demo, lanes=2, tp=2))


def check_native(model_dir: Path, layout: Layout) -> None:
    architecture = read_architecture(model_dir)
    plan = plan_memory(architecture, layout, terms(native_form()))
    for rank in (0, layout.world_size - 1):
        tensors = load_shard(model_dir, shard_plan(architecture, layout, rank))
        weights = assemble(tensors, architecture, layout.place(rank), layout.tp, native_kernels())
        found = dict.fromkeys(Kind, 0)
        for kind, tensor in held_tensors(weights):
            found[kind] += tensor.untyped_storage().nbytes()
        assert plan.ranks[rank].weights == found


def native_kernels() -> KernelSet:
    try:
        return KernelSet.native()
    except NoNativeKernelsError as error:
        pytest.skip(str(error))


def test_panels_are_those_of_the_native_layout() -> None:
    assert (PANEL, PLAIN_BLOCK) == (packed.PANEL, packed.BLOCK)
    # 576 x 7168 of kv_a: 36 panels, though its scales have a fifth row of blocks that is half empty.
    assert packed_bytes(576, 7168, 128) == 576 * 7168 + 36 * 56 * 4
    assert packed_bytes(128, 100, None) == 8 * 16 * 128 * 2, "depth is filled up to 32"
