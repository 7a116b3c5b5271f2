"""Every byte of a checkpoint belongs to the right ranks, in any legal layout."""

from collections import Counter
from itertools import pairwise

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k2dist.config import Architecture
from k2dist.errors import LayoutError
from k2dist.ids import ExpertId, LaneId, TpRank, WorldRank
from k2dist.parallel import (
    Layout,
    Published,
    RankPlace,
    ShardPlan,
    Share,
    TensorRead,
    check_layout,
    first_layout,
    leftover_tensors,
    published_tensors,
    shard_plan,
)
from k2dist.parallel.shard_plan import NO_LANE


@st.composite
def layouts(draw: st.DrawFn, num_experts: int, num_moe_layers: int) -> Layout:
    """Any legal table: lanes scattered over ranks, ranks without lane, uneven slots, second copies."""
    tp = draw(st.sampled_from([1, 2, 4]))
    num_lanes = draw(st.integers(1, 3))
    places: list[tuple[int, int] | None] = [(lane, rank) for lane in range(num_lanes) for rank in range(tp)]
    places += [None] * draw(st.integers(0, min(3, num_experts - len(places))))
    places = draw(st.permutations(places))
    world = len(places)
    held: list[list[set[int]]] = [[set() for _ in range(num_moe_layers)] for _ in range(world)]
    for layer in range(num_moe_layers):
        for expert in range(num_experts):
            for rank in draw(st.sets(st.integers(0, world - 1), min_size=1, max_size=2)):
                held[rank][layer].add(expert)
    for rank, place in enumerate(places):
        if place is None:  # a rank without a lane must have something to do
            held[rank][0].add(draw(st.integers(0, num_experts - 1)))
    ranks = tuple(
        RankPlace(
            world_rank=WorldRank(rank),
            lane=None if place is None else LaneId(place[0]),
            tp_rank=None if place is None else TpRank(place[1]),
            experts=tuple(
                tuple(map(ExpertId, draw(st.permutations(sorted(experts))))) for experts in held[rank]
            ),
        )
        for rank, place in enumerate(places)
    )
    return Layout(tp=tp, ranks=ranks)


def whole(tensor: Published) -> tuple[int, int, int, int]:
    return (0, tensor.shape[0], 0, tensor.shape[1] if len(tensor.shape) == 2 else 1)


def rectangle(read: TensorRead) -> tuple[int, int, int, int]:
    return (read.row_start, read.row_stop, read.col_start, read.col_stop)


@given(data=st.data())
@settings(max_examples=25, deadline=None, derandomize=True)
def test_every_byte_belongs_to_the_right_ranks(small: Architecture, data: st.DataObject) -> None:
    layout = data.draw(layouts(small.num_experts, small.num_moe_layers))
    check_layout(small, layout)
    plans = [shard_plan(small, layout, rank) for rank in range(layout.world_size)]
    reads = [{read.name: read for read in plan.reads} for plan in plans]
    for tensor in published_tensors(small):
        holders = {rank for rank, mine in enumerate(reads) if tensor.name in mine}
        if tensor.share is Share.EXPERT:
            assert tensor.layer is not None
            layer = tensor.layer - small.first_dense_layers
            assert holders == {r.world_rank for r in layout.ranks if tensor.expert in r.experts[layer]}
        else:
            assert holders == {rank.world_rank for rank in layout.ranks if rank.lane is not None}
        if tensor.share in (Share.EXPERT, Share.WHOLE):
            assert all(rectangle(reads[rank][tensor.name]) == whole(tensor) for rank in holders)
            continue
        for lane in range(layout.num_lanes):
            _check_slices(tensor, [reads[rank][tensor.name] for rank in layout.members(lane)])


def _check_slices(tensor: Published, slices: list[TensorRead]) -> None:
    """Equal slices in tp order, next to each other, none left over, cut across the right axis."""
    ranges = [
        (s.row_start, s.row_stop) if tensor.share is Share.ROWS else (s.col_start, s.col_stop) for s in slices
    ]
    others = [
        (s.col_start, s.col_stop) if tensor.share is Share.ROWS else (s.row_start, s.row_stop) for s in slices
    ]
    axis = 0 if tensor.share is Share.ROWS else 1
    assert ranges[0][0] == 0
    assert ranges[-1][1] == tensor.shape[axis]
    assert all(left[1] == right[0] for left, right in pairwise(ranges))
    assert len({stop - start for start, stop in ranges}) == 1
    assert set(others) == {(0, tensor.shape[1 - axis])}
    assert sum(s.num_bytes for s in slices) == tensor.num_bytes


@given(data=st.data())
@settings(max_examples=25, deadline=None, derandomize=True)
def test_every_name_is_read_once_or_skipped_once(small: Architecture, data: st.DataObject) -> None:
    layout = data.draw(layouts(small.num_experts, small.num_moe_layers))
    expected = {tensor.name for tensor in published_tensors(small)}
    for rank in range(layout.world_size):
        plan = shard_plan(small, layout, rank)
        named = Counter([r.name for r in plan.reads] + [s.name for s in plan.skips if not s.is_optional])
        assert named == Counter(expected)
        assert {s.name for s in plan.skips if s.is_optional} == {t.name for t in leftover_tensors(small)}
        assert all(skip.reason for skip in plan.skips)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_scales_are_cut_where_their_weights_are(small: Architecture, tp: int) -> None:
    layout = first_layout(small, lanes=1, tp=tp)
    num_checked = 0
    for rank in range(tp):
        reads = {read.name: read for read in shard_plan(small, layout, rank).reads}
        for name, read in reads.items():
            scale = reads.get(f"{name}_scale_inv")
            assert (scale is not None) == (read.dtype == "F8_E4M3")
            if scale is not None:
                starts = (read.row_start, read.col_start)
                assert all(start % 128 == 0 for start in starts), f"{name} is cut inside a scale block"
                assert (scale.row_start, scale.col_start) == tuple(start // 128 for start in starts)
                assert scale.cut_shape == tuple(-(-size // 128) for size in read.cut_shape)
                num_checked += 1
    # attention 5 x 3, dense 3, shared 3 x 2 on every rank; 12 x 3 x 2 of experts over all ranks
    assert num_checked == 24 * tp + 72


@pytest.fixture(scope="module")
def k2_tensors(k2: Architecture) -> dict[str, Published]:
    return {tensor.name: tensor for tensor in (*published_tensors(k2), *leftover_tensors(k2))}


def test_k2_publishes_139644_tensors(k2_tensors: dict[str, Published]) -> None:
    assert len(k2_tensors) == 139_644
    assert sum(tensor.num_bytes for tensor in k2_tensors.values()) == 1_029_173_256_720


@pytest.mark.parametrize(
    ("name", "dtype", "shape"),
    [
        ("model.embed_tokens.weight", "BF16", (163840, 7168)),
        ("lm_head.weight", "BF16", (163840, 7168)),
        ("model.layers.60.self_attn.kv_a_proj_with_mqa.weight", "F8_E4M3", (576, 7168)),
        ("model.layers.60.self_attn.kv_a_proj_with_mqa.weight_scale_inv", "F32", (5, 56)),
        ("model.layers.0.self_attn.q_b_proj.weight_scale_inv", "F32", (96, 12)),
        ("model.layers.0.self_attn.kv_b_proj.weight", "F8_E4M3", (16384, 512)),
        ("model.layers.0.self_attn.o_proj.weight_scale_inv", "F32", (56, 64)),
        ("model.layers.0.mlp.down_proj.weight", "F8_E4M3", (7168, 18432)),
        ("model.layers.1.mlp.gate.weight", "BF16", (384, 7168)),
        ("model.layers.1.mlp.gate.e_score_correction_bias", "F32", (384,)),
        ("model.layers.17.mlp.experts.383.down_proj.weight_scale_inv", "F32", (56, 16)),
        ("model.layers.60.mlp.shared_experts.up_proj.weight", "F8_E4M3", (2048, 7168)),
    ],
)
def test_k2_tensors_are_as_published(
    k2_tensors: dict[str, Published], name: str, dtype: str, shape: tuple[int, ...]
) -> None:
    assert (k2_tensors[name].dtype, k2_tensors[name].shape) == (dtype, shape)


def test_k2_at_tp_16_reads_what_section_2_8_says(k2: Architecture) -> None:
    plan = shard_plan(k2, first_layout(k2, lanes=1, tp=16), 15)
    reads = {read.name: read for read in plan.reads}
    assert reads["model.layers.0.mlp.gate_proj.weight"].cut_shape == (1152, 7168)
    assert reads["model.layers.0.mlp.down_proj.weight"].cut_shape == (7168, 1152)
    assert reads["model.layers.9.self_attn.q_b_proj.weight"].cut_shape == (768, 1536)
    assert reads["model.layers.9.self_attn.kv_b_proj.weight"].cut_shape == (1024, 512)
    o_proj = reads["model.layers.9.self_attn.o_proj.weight"]
    assert (o_proj.col_start, o_proj.col_stop) == (7680, 8192)
    o_scale = reads["model.layers.9.self_attn.o_proj.weight_scale_inv"]
    assert (o_scale.col_start, o_scale.col_stop) == (60, 64)
    assert reads["lm_head.weight"].cut_shape == (10240, 7168)
    assert sum(".mlp.experts." in name for name in reads) == 24 * 60 * 6


def test_a_rank_without_lane_reads_experts_alone(small: Architecture) -> None:
    plan = shard_plan(small, first_layout(small, lanes=1, tp=1, expert_only_ranks=1), 1)
    assert plan.reads
    assert all(".mlp.experts." in read.name for read in plan.reads)
    assert sum(skip.reason == NO_LANE for skip in plan.skips) == 67


def test_an_unquantised_model_has_no_scales(small: Architecture) -> None:
    plain = msgspec.structs.replace(small, scale_block=None)
    plan = shard_plan(plain, first_layout(plain, lanes=1, tp=8), 3)
    assert not [read for read in plan.reads if read.name.endswith("_scale_inv")]
    assert {read.dtype for read in plan.reads} == {"BF16", "F32"}


def test_mtp_layers_are_skipped_by_name(small: Architecture) -> None:
    with_mtp = msgspec.structs.replace(small, num_mtp_layers=1)
    (skip,) = [
        s for s in shard_plan(with_mtp, first_layout(with_mtp, lanes=1, tp=1), 0).skips if "*" in s.name
    ]
    assert (skip.name, skip.is_optional) == ("model.layers.3.*", True)


def test_a_plan_crosses_processes_unchanged(small: Architecture) -> None:
    plan = shard_plan(small, first_layout(small, lanes=1, tp=4), 2)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(plan), type=ShardPlan) == plan


def test_an_illegal_layout_has_no_plan(small: Architecture) -> None:
    legal = first_layout(small, lanes=1, tp=4)
    with pytest.raises(LayoutError, match="tp=4: intermediate_size: 256 / 4 = 64 cuts a 128-block; use tp=2"):
        shard_plan(msgspec.structs.replace(small, intermediate_size=256), legal, 0)
