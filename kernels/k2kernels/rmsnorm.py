"""RMSNorm over the last axis: y = x / sqrt(mean(x^2) + eps) * weight.

T tokens (may be 0), D width. x, weight and y share a dtype; mean and quotient are float32, and the quotient
is rounded before it meets the weight, as in the published model code.
Source: Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4; transformers 5.23, modeling_deepseek_v3.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from k2kernels.arguments import FLOATS, check_tensor
from k2kernels.cost import Cost
from k2kernels.jit import OPTIONS, jit, next_power_of_2
from k2kernels.portable import narrow
from k2kernels.rows import tree_sum

if TYPE_CHECKING:
    import triton.language as tl


def reference(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    x32_TD = x_TD.float()
    mean_T1 = tree_sum(x32_TD * x32_TD, -1)[:, None] / x_TD.shape[1]
    return (x32_TD / (mean_T1 + eps).sqrt()).to(x_TD.dtype) * weight_D


@jit
def _rmsnorm(x_ptr, weight_ptr, y_ptr, x_stride, D, eps, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)  # 300,000 rows of 7,168 pass 2^31
    d_D = tl.arange(0, TILE)
    x = tl.load(x_ptr + row * x_stride + d_D, mask=d_D < D, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + d_D, mask=d_D < D, other=0.0).to(tl.float32)
    rms = tl.sqrt_rn(tl.div_rn(tl.sum(x * x, axis=0), D.to(tl.float32)) + eps)
    unit = narrow(tl.div_rn(x, rms), y_ptr.dtype.element_ty).to(tl.float32)
    tl.store(y_ptr + row * D + d_D, narrow(unit * weight, y_ptr.dtype.element_ty), mask=d_D < D)


def launch(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """As `reference`; the squares are added in another order."""
    check_tensor("x_TD", x_TD, (None, None), FLOATS, x_TD.device)
    num_tokens, width = x_TD.shape
    check_tensor("weight_D", weight_D, (width,), (x_TD.dtype,), x_TD.device)
    y_TD = torch.empty(num_tokens, width, dtype=x_TD.dtype, device=x_TD.device)
    if num_tokens:
        tile, stride = next_power_of_2(width), x_TD.stride(0)
        num_warps = min(8, max(1, tile // 512))
        _rmsnorm[num_tokens,](
            x_TD, weight_D, y_TD, stride, width, eps, TILE=tile, num_warps=num_warps, **OPTIONS
        )
    return y_TD


@dataclass(frozen=True, slots=True)
class Case:
    T: int
    D: int


CASES = [Case(T=t, D=d) for t in (0, 1, 7, 4096) for d in (512, 1536, 7168)]


def cost(case: Case) -> Cost:
    return Cost(2 * (2 * case.T + 1) * case.D, 4 * case.T * case.D)
