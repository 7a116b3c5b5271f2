"""What a step must move and compute is what the kernels say of their ops, one by one."""

from __future__ import annotations

import pytest
from k2kernels import absorb, fp8_gemm, grouped_gemm, linear_bf16, mla_decode, mla_prefill, router_logits
from k2kernels.cost import Cost

from k2dist.config import Architecture
from k2dist.planner.work import LaneWork, Part, Sort, Traffic, Work, expert_work, lane_work


def total(works: list[Work], part: Part, sort: Sort) -> Cost:
    chosen = [work for work in works if (work.part, work.sort) == (part, sort)]
    return Cost(
        round(sum(work.times * work.num_bytes for work in chosen)),
        round(sum(work.times * work.num_flops for work in chosen)),
    )


def added(costs: list[Cost], times: int = 1) -> Cost:
    return Cost(times * sum(c.num_bytes for c in costs), times * sum(c.num_flops for c in costs))


@pytest.mark.parametrize(("tp", "decoded", "prompt"), [(1, 1, 0), (1, 64, 1024), (8, 16, 512), (4, 0, 300)])
def test_a_lanes_work_is_the_sum_of_its_kernels(k2: Architecture, tp: int, decoded: int, prompt: int) -> None:
    heads, rows = 64 // tp, decoded + prompt
    own = -(-rows // tp)
    work = LaneWork(
        num_rows=rows, own_rows=own, decode_rows=decoded, num_keys=5000, prompt_rows=prompt, prompt_start=700
    )
    found = list(lane_work(k2, tp, work))
    linears = [(own, 2112, 7168), (rows, heads * 192, 1536), (rows, 7168, heads * 128)]
    assert total(found, Part.ATTENTION, Sort.FLOAT8) == added(
        [fp8_gemm.cost(fp8_gemm.Case(T=t, N=n, K=k)) for t, n, k in linears], 61
    )
    absorbs = [absorb.Case(T=decoded, H=heads, K=k, N=n) for k, n in ((128, 512), (512, 128)) if decoded]
    as_stored = [absorb.cost(case) for case in absorbs]
    widened = [Cost(case.H * case.K * case.N, 0) for case in absorbs]  # devices hold them in bfloat16
    assert total(found, Part.ATTENTION, Sort.PLAIN) == added(as_stored + widened, 61)
    decodes = [mla_decode.Case(R=decoded, num_keys=5000, H=heads)] if decoded else []
    assert total(found, Part.ATTENTION, Sort.DECODE) == added([mla_decode.cost(c) for c in decodes], 61)
    prompts = [mla_prefill.Case(T=prompt, start=700, H=heads)] if prompt else []
    assert total(found, Part.ATTENTION, Sort.PROMPT) == added([mla_prefill.cost(c) for c in prompts], 61)
    dense = [(rows, 2 * 18432 // tp, 7168), (rows, 7168, 18432 // tp)]
    assert total(found, Part.DENSE, Sort.FLOAT8) == added(
        [fp8_gemm.cost(fp8_gemm.Case(T=t, N=n, K=k)) for t, n, k in dense]
    )
    head = linear_bf16.Case(T=work.num_samples, N=163840 // tp, K=7168)
    assert total(found, Part.HEAD, Sort.PLAIN) == linear_bf16.cost(head)


def test_experts_work_is_the_sum_of_its_kernels(k2: Architecture) -> None:
    traffic = Traffic(num_rows=40, rows_sent=100, rows_arrived=90, row_bytes=7392, pairs=320, slots_hit=24)
    found = list(expert_work(k2, 2, traffic))
    cases = [grouped_gemm.Case(M=320, e=24, N=n, K=k) for n, k in ((4096, 7168), (7168, 2048))]
    assert total(found, Part.EXPERTS, Sort.GROUPED) == added([grouped_gemm.cost(case) for case in cases])
    assert total(found, Part.ROUTER, Sort.PLAIN) == router_logits.cost(router_logits.Case(T=40))
    shared = [(40, 4096, 7168), (40, 7168, 2048)]
    assert total(found, Part.SHARED, Sort.FLOAT8) == added(
        [fp8_gemm.cost(fp8_gemm.Case(T=t, N=n, K=k)) for t, n, k in shared]
    )
    assert total(found, Part.DISPATCH, Sort.MOVE) == Cost(2 * 190 * 7392, 0)
    assert total(found, Part.COMBINE, Sort.MOVE) == Cost(2 * (320 + 40 * 8) * 7168 * 2, 0)


def test_many_prompts_are_each_attended_for_themselves(k2: Architecture) -> None:
    one = LaneWork(num_rows=300, own_rows=300, decode_rows=0, num_keys=0, prompt_rows=300, prompt_start=50)
    four = LaneWork(
        num_rows=1200, own_rows=1200, decode_rows=0, num_keys=0, prompt_rows=1200, prompts=4, prompt_start=50
    )
    single, all_four = (
        total(list(lane_work(k2, 1, work)), Part.ATTENTION, Sort.PROMPT) for work in (one, four)
    )
    assert all_four == Cost(4 * single.num_bytes, 4 * single.num_flops)
