"""An MoE layer's result from its parts: y = sum over k of weight_k * out_k, then the shared expert's output.

T tokens (may be 0), K experts of each in ascending order, D width. out: what came home, bfloat16 or float32;
weight and shared: float32. Added one after another in float32, (((w0 o0 + w1 o1) + w2 o2) + ...) + shared,
and rounded once, to `out_dtype`. The routed scale is in the weights; the shared expert has none.
Source: DeepSeek-V3 report, arXiv:2412.19437, eq. 12; k2_facts 2.6.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from k2kernels.cost import Cost


def reference(out_TKD: Tensor, weight_TK: Tensor, shared_TD: Tensor, out_dtype: torch.dtype) -> Tensor:
    weighted_TKD = out_TKD.float() * weight_TK[:, :, None]
    sum_TD = weighted_TKD[:, 0]
    for k in range(1, weighted_TKD.shape[1]):
        sum_TD = sum_TD + weighted_TKD[:, k]
    return (sum_TD + shared_TD).to(out_dtype)


@dataclass(frozen=True, slots=True)
class Case:
    T: int
    K: int = 8
    D: int = 7168


CASES = [Case(T=t) for t in (0, 1, 64, 4096)]


def cost(case: Case) -> Cost:
    return Cost(case.T * case.D * (2 * case.K + 6), 2 * case.T * case.K * case.D)
