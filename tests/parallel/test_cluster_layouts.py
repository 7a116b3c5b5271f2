"""K2 in every committed layout: each byte of its files is read by the right ranks, as often as it should be.

The expectations are written out here from the published shapes (k2_facts 2.8 and 3), apart from the table of
who shares what in the code. Nothing is read: tensors tile files, and reads tile tensors, which is shown by
arithmetic on intervals.
"""

import re
from itertools import pairwise
from pathlib import Path

import pytest

from k2dist.config import Architecture
from k2dist.config.cluster import ParallelConfig
from k2dist.config.load import load_cluster
from k2dist.parallel import (
    ByteRuns,
    Layout,
    ShardPlan,
    TensorRead,
    configured_layout,
    file_maps,
    first_layout,
    shard_plan,
    shard_plans,
)

CONFIGS = (Path(__file__).resolve().parents[2] / "cluster_configs").glob("*.yaml")
# Some differ in their machines alone.
PARALLELS = {load_cluster(path).parallel: path.stem for path in sorted(CONFIGS)}

# Name -> the axis that tp slices: 0 rows, 1 columns, None neither.
AXES = {
    r"model\.embed_tokens\.weight|lm_head\.weight": 0,
    r"model\.norm\.weight": None,
    r"model\.layers\.\d+\.(input|post_attention)_layernorm\.weight": None,
    r"model\.layers\.\d+\.self_attn\.(q_a|kv_a)_layernorm\.weight": None,
    r"model\.layers\.\d+\.self_attn\.(q_a_proj|kv_a_proj_with_mqa)\.weight(_scale_inv)?": None,
    r"model\.layers\.\d+\.self_attn\.(q_b|kv_b)_proj\.weight(_scale_inv)?": 0,
    r"model\.layers\.\d+\.self_attn\.o_proj\.weight(_scale_inv)?": 1,
    r"model\.layers\.0\.mlp\.(gate|up)_proj\.weight(_scale_inv)?": 0,
    r"model\.layers\.0\.mlp\.down_proj\.weight(_scale_inv)?": 1,
    r"model\.layers\.\d+\.mlp\.gate\.(weight|e_score_correction_bias)": None,
    r"model\.layers\.\d+\.mlp\.shared_experts\.(gate|up|down)_proj\.weight(_scale_inv)?": None,
}
EXPERT = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.(gate|up|down)_proj\.weight(_scale_inv)?")


def fp8(rows: int, columns: int) -> int:
    """Bytes of a weight and its scales."""
    return rows * columns + -(-rows // 128) * -(-columns // 128) * 4


EXPERT_BYTES = 2 * fp8(2048, 7168) + fp8(7168, 2048)
SLICED_BYTES = (  # by tp, once a lane
    61 * (fp8(12288, 1536) + fp8(16384, 512) + fp8(7168, 8192))
    + 2 * fp8(18432, 7168)
    + fp8(7168, 18432)
    + 2 * 163840 * 7168 * 2
)
WHOLE_BYTES = (  # on each rank of a lane
    61 * (fp8(1536, 7168) + fp8(576, 7168) + 2 * (2 * 7168 + 1536 + 512))
    + 60 * (384 * 7168 * 2 + 384 * 4 + EXPERT_BYTES)
    + 2 * 7168
)
INV_FREQ_BYTES = 61 * 56 * 2


def test_the_parts_are_the_whole() -> None:
    whole = 384 * 60 * EXPERT_BYTES + SLICED_BYTES + WHOLE_BYTES + INV_FREQ_BYTES
    assert whole == 1_029_173_256_720
    assert 44.04e6 < EXPERT_BYTES < 44.06e6
    assert round(384 * 60 * EXPERT_BYTES / 1e9, 2) == 1014.93


@pytest.fixture(scope="module")
def stored_bytes(k2: Architecture) -> dict[str, int]:
    """Of every tensor but the leftovers; that they tile the files is shown in test_files."""
    return {
        name: stored.end - stored.begin for file in file_maps(k2) for name, stored in file.tensors.items()
    }


@pytest.mark.parametrize("parallel", PARALLELS, ids=PARALLELS.values())
def test_every_byte_of_k2_goes_to_the_right_ranks(
    k2: Architecture, stored_bytes: dict[str, int], parallel: ParallelConfig
) -> None:
    layout = configured_layout(k2, parallel)
    read_by: dict[str, list[tuple[int, TensorRead]]] = {name: [] for name in stored_bytes}
    num_bytes = 0
    for plan in shard_plans(k2, layout):
        num_bytes += plan.num_bytes
        for read in plan.reads:
            read_by[read.name].append((plan.world_rank, read))
    holders = expert_holders(layout)
    lanes = [layout.members(lane) for lane in range(layout.num_lanes)]
    laned = {rank for lane in lanes for rank in lane}
    for name, reads in read_by.items():
        by_rank = dict(reads)
        assert len(by_rank) == len(reads), f"{name}: twice by one rank"
        expert = EXPERT.fullmatch(name)
        assert by_rank.keys() == (holders[int(expert[1]) - 1, int(expert[2])] if expert else laned), name
        axis = None if expert else axis_of(name)
        distinct = {id(read): read for read in by_rank.values()}.values()  # ranks share equal reads
        if axis is None:
            assert all(tiles([read.runs], stored_bytes[name]) for read in distinct), name
            continue
        assert all(is_whole_across(read, axis) for read in distinct), name
        for lane in lanes:
            assert tiles([by_rank[rank].runs for rank in lane], stored_bytes[name]), name
    num_slots = sum(len(experts) for rank in layout.ranks for experts in rank.experts)
    assert num_bytes == (
        parallel.lanes * (SLICED_BYTES + parallel.tp * WHOLE_BYTES) + num_slots * EXPERT_BYTES
    )


def expert_holders(layout: Layout) -> dict[tuple[int, int], set[int]]:
    """(MoE layer, expert) -> the ranks that have a slot for it."""
    found: dict[tuple[int, int], set[int]] = {(layer, e): set() for layer in range(60) for e in range(384)}
    for rank in layout.ranks:
        for layer, experts in enumerate(rank.experts):
            for expert in experts:
                found[layer, expert].add(rank.world_rank)
    return found


def axis_of(name: str) -> int | None:
    (axis,) = [axis for pattern, axis in AXES.items() if re.fullmatch(pattern, name)]
    return axis


def is_whole_across(read: TensorRead, axis: int) -> bool:
    """Whether the other axis is not cut."""
    if axis == 0:
        return (read.col_start, read.col_stop) == (0, read.shape[1])
    return (read.row_start, read.row_stop) == (0, read.shape[0])


def tiles(parts: list[ByteRuns], num_bytes: int) -> bool:
    """Whether `parts`, in their order, hold every byte of [0, num_bytes) once.

    Parts of one run each lie end to end. Parts of many runs share a stride, in which they lie end to end.
    """
    period = parts[0].stride if parts[0].num_runs > 1 else num_bytes
    if any(part.num_runs > 1 and part.stride != period for part in parts):
        return False
    if any(part.num_runs * period != num_bytes for part in parts):
        return False
    ends = [(part.first, part.first + part.run_bytes) for part in parts]
    return ends[0][0] == 0 and ends[-1][1] == period and all(a[1] == b[0] for a, b in pairwise(ends))


def test_tiling_is_seen_and_its_lack_too() -> None:
    whole, left, right = ByteRuns(0, 12, 12, 1), ByteRuns(0, 4, 4, 1), ByteRuns(4, 8, 8, 1)
    assert tiles([whole], 12)
    assert tiles([left, right], 12)
    assert not tiles([right, left], 12)
    assert not tiles([left, left], 12)
    assert not tiles([left], 12)
    a, b = ByteRuns(0, 1, 3, 4), ByteRuns(1, 2, 3, 4)
    assert tiles([a, b], 12)
    assert not tiles([a, b], 15)
    assert not tiles([b], 12)
    assert not tiles([a, a], 12)
    assert not tiles([a, right], 12)


def part(k2: Architecture, lanes: int, tp: int) -> ShardPlan:
    return shard_plan(k2, first_layout(k2, lanes=lanes, tp=tp), 0)


def test_a_rank_reads_the_gigabytes_of_section_2_8(k2: Architecture) -> None:
    """Its figures leave out parts, named here, so that they can be compared to the last digit it gives."""
    dense, routers = 3 * fp8(18432, 7168), 60 * (384 * 7168 * 2 + 384 * 4)
    shared = 60 * EXPERT_BYTES
    data_parallel = part(k2, 16, 1).num_bytes  # attention, shared expert, embedding and head replicated
    assert round((data_parallel - dense) / 1e9, 1) == 77.3
    tensor_parallel = part(k2, 1, 16).num_bytes  # there with the shared expert sliced; here it is whole
    assert round((tensor_parallel - routers - shared * 15 / 16) / 1e9, 1) == 65.2
    eight = part(k2, 1, 8).num_bytes  # there an eighth of everything; here what is not sliced is whole
    assert round((eight - (WHOLE_BYTES + INV_FREQ_BYTES) * 7 / 8 + INV_FREQ_BYTES) / 1e9, 1) == 128.6
