"""RMSNorm over the last axis: y = x / sqrt(mean(x^2) + eps) * weight.

T tokens (may be 0), D width. x, weight and y share a dtype; mean and quotient are float32, and the quotient
is rounded before it meets the weight, as in the published model code.
Source: Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4; transformers 5.23, modeling_deepseek_v3.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from k2kernels.cost import Cost
from k2kernels.rows import tree_sum


def reference(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    x32_TD = x_TD.float()
    mean_T1 = tree_sum(x32_TD * x32_TD, -1)[:, None] / x_TD.shape[1]
    return (x32_TD / (mean_T1 + eps).sqrt()).to(x_TD.dtype) * weight_D


@dataclass(frozen=True, slots=True)
class Case:
    T: int
    D: int


CASES = [Case(T=t, D=d) for t in (0, 1, 7, 4096) for d in (512, 1536, 7168)]


def cost(case: Case) -> Cost:
    return Cost(2 * (2 * case.T + 1) * case.D, 4 * case.T * case.D)
