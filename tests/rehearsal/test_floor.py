"""The floor of K2's parts against sums done by hand, in units of bytes: a byte takes a second."""

from __future__ import annotations

import pytest
from k2kernels.bench.ceilings import Ceilings

from k2dist.config import KIMI_K2, find_architecture
from k2dist.planner.work import LaneWork, Part, Traffic
from k2dist.rehearsal.floor import Floor

K2 = find_architecture(KIMI_K2)
MEMORY_BOUND = Ceilings(read_gb_s=1e-9, copy_gb_s=1e-9, bfloat16_tflop_s=1e-3, e4m3_factor=2.0)
ARITHMETIC_BOUND = Ceilings(read_gb_s=1e3, copy_gb_s=1e3, bfloat16_tflop_s=1e-12, e4m3_factor=2.0)
NOTHING = LaneWork(num_rows=0, own_rows=0, decode_rows=0, num_keys=0, prompt_rows=0)
DECODE = LaneWork(num_rows=1, own_rows=1, decode_rows=1, num_keys=1000, prompt_rows=0)


def traffic(pairs: int, hit: int, num_rows: int = 0) -> Traffic:
    return Traffic(
        num_rows=num_rows, rows_sent=0, rows_arrived=pairs, row_bytes=7424, pairs=pairs, slots_hit=hit
    )


def test_experts_that_are_hit_are_read_once_each() -> None:
    floor_s = Floor(K2, 1, 2, MEMORY_BOUND).parts_s(NOTHING, [traffic(30, 5)] * 60)
    weights = 60 * 5 * 3 * 2048 * 7168
    rows = 60 * 30 * (7168 + 2 * 4096 + 2048 + 2 * 7168)  # in and out of both products
    assert floor_s[Part.EXPERTS] == pytest.approx(weights + rows)
    assert floor_s[Part.DISPATCH] == pytest.approx(60 * 2 * 30 * 7424)
    assert floor_s[Part.COMBINE] == pytest.approx(60 * 2 * 30 * 7168 * 2)
    assert floor_s[Part.ATTENTION] == floor_s[Part.HEAD] == floor_s[Part.SHARED] == 0


def test_many_rows_are_bound_by_arithmetic_of_float8() -> None:
    floor_s = Floor(K2, 1, 2, ARITHMETIC_BOUND).parts_s(NOTHING, [traffic(1000, 24)])
    assert floor_s[Part.EXPERTS] == pytest.approx(1000 * 2 * 3 * 2048 * 7168 / 2.0)


def test_a_decoding_rank_reads_its_weights_and_the_latents() -> None:
    floor_s = Floor(K2, 1, 2, MEMORY_BOUND).parts_s(DECODE, [traffic(1, 1, num_rows=1)])
    linears = 2112 * 7168 + 64 * 192 * 1536 + 7168 * 8192
    absorbed = 2 * 2 * 64 * 128 * 512  # both halves of kv_b in bfloat16
    latents = 2 * 1000 * 576
    assert floor_s[Part.ATTENTION] == pytest.approx(61 * (linears + absorbed + latents), rel=0.01)
    assert floor_s[Part.SHARED] == pytest.approx(3 * 2048 * 7168, rel=0.001)
    assert floor_s[Part.DENSE] == pytest.approx(3 * 18432 * 7168, rel=0.001)
    assert floor_s[Part.HEAD] == pytest.approx(2 * 163840 * 7168, rel=0.001)
    assert floor_s[Part.ROUTER] == pytest.approx(4 * 384 * 7168, rel=0.01)


def test_tp_divides_heads_dense_layers_and_head() -> None:
    whole, part = (Floor(K2, tp, 2, MEMORY_BOUND).parts_s(DECODE, []) for tp in (1, 8))
    for name in (Part.DENSE, Part.HEAD):
        assert part[name] == pytest.approx(whole[name] / 8, rel=0.01)
    kept = 61 * (2112 * 7168 + 2 * 1000 * 576)  # q_a and kv_a, and the latents, are whole on every rank
    assert part[Part.ATTENTION] - kept == pytest.approx((whole[Part.ATTENTION] - kept) / 8, rel=0.02)
