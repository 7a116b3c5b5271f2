"""An MoE layer's result from its parts: y = sum over k of weight_k * out_k, then the shared expert's output.

T tokens (may be 0), K experts of each in ascending order, D width. out: what came home, bfloat16 or float32;
weight and shared: float32. Added one after another in float32, (((w0 o0 + w1 o1) + w2 o2) + ...) + shared,
and rounded once, to `out_dtype`. The routed scale is in the weights; the shared expert has none.
Source: DeepSeek-V3 report, arXiv:2412.19437, eq. 12; k2_facts 2.6.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from k2kernels.arguments import FLOAT32, FLOATS, check_tensor, require
from k2kernels.cost import Cost
from k2kernels.jit import OPTIONS, jit
from k2kernels.portable import narrow

if TYPE_CHECKING:
    import triton.language as tl


def reference(out_TKD: Tensor, weight_TK: Tensor, shared_TD: Tensor, out_dtype: torch.dtype) -> Tensor:
    weighted_TKD = out_TKD.float() * weight_TK[:, :, None]
    sum_TD = weighted_TKD[:, 0]
    for k in range(1, weighted_TKD.shape[1]):
        sum_TD = sum_TD + weighted_TKD[:, k]
    return (sum_TD + shared_TD).to(out_dtype)


@jit
def _weighted_sum(
    out_ptr,
    weight_ptr,
    shared_ptr,
    y_ptr,
    D,
    out_token_stride,
    out_expert_stride,
    weight_stride,
    shared_stride,
    TOP_K: tl.constexpr,
    TILE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    d_D = tl.program_id(1) * TILE + tl.arange(0, TILE)
    is_in = d_D < D
    out_at = out_ptr + token * out_token_stride + d_D
    weight_at = weight_ptr + token * weight_stride
    total = tl.load(out_at, mask=is_in, other=0.0).to(tl.float32) * tl.load(weight_at)
    for k in tl.static_range(1, TOP_K):
        out = tl.load(out_at + k * out_expert_stride, mask=is_in, other=0.0).to(tl.float32)
        total += out * tl.load(weight_at + k)
    total += tl.load(shared_ptr + token * shared_stride + d_D, mask=is_in, other=0.0)
    tl.store(y_ptr + token * D + d_D, narrow(total, y_ptr.dtype.element_ty), mask=is_in)


def launch(out_TKD: Tensor, weight_TK: Tensor, shared_TD: Tensor, out_dtype: torch.dtype) -> Tensor:
    """As `reference`, with the same bits."""
    check_tensor("out_TKD", out_TKD, (None, None, None), FLOATS, out_TKD.device)
    num_tokens, top_k, width = out_TKD.shape
    require(top_k > 0, "out_TKD: no expert")
    check_tensor("weight_TK", weight_TK, (num_tokens, top_k), FLOAT32, out_TKD.device)
    check_tensor("shared_TD", shared_TD, (num_tokens, width), FLOAT32, out_TKD.device)
    y_TD = torch.empty(num_tokens, width, dtype=out_dtype, device=out_TKD.device)
    if num_tokens:
        _weighted_sum[num_tokens, -(-width // 1024)](
            out_TKD,
            weight_TK,
            shared_TD,
            y_TD,
            width,
            out_TKD.stride(0),
            out_TKD.stride(1),
            weight_TK.stride(0),
            shared_TD.stride(0),
            TOP_K=top_k,
            TILE=1024,
            num_warps=4,
            **OPTIONS,
        )
    return y_TD


@dataclass(frozen=True, slots=True)
class Case:
    T: int
    K: int = 8
    D: int = 7168


CASES = [Case(T=t) for t in (0, 1, 64, 4096)]


def cost(case: Case) -> Cost:
    return Cost(case.T * case.D * (2 * case.K + 6), 2 * case.T * case.K * case.D)
