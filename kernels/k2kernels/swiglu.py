"""SwiGLU's middle: y = silu(gate) * up, where h = [gate | up].

T rows (may be 0), F width. h and y share a dtype; silu(x) = x / (1 + e^-x) and the product are float32, and
rounded once. Source: Shazeer 2020, arXiv:2002.05202, eq. 6; Kimi K2 config.json (`hidden_act`: silu).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from k2kernels import portable
from k2kernels.arguments import FLOATS, check_tensor, require
from k2kernels.cost import Cost
from k2kernels.jit import OPTIONS, jit
from k2kernels.portable import narrow
from k2kernels.rows import sigmoid

sigmoid_tile = portable.sigmoid

if TYPE_CHECKING:
    import triton.language as tl


def reference(h_TG: Tensor) -> Tensor:
    """`h_TG`: [T, 2F]. Result: [T, F]."""
    gate_TF, up_TF = h_TG.float().chunk(2, dim=-1)
    return (gate_TF * sigmoid(gate_TF) * up_TF).to(h_TG.dtype)


@jit
def gated(gate, up, DTYPE: tl.constexpr):
    """silu(gate) * up of float32 tiles, in `DTYPE`."""
    return narrow(gate * sigmoid_tile(gate) * up, DTYPE)


@jit
def _swiglu(h_ptr, y_ptr, F, h_stride, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    f_F = tl.program_id(1) * TILE + tl.arange(0, TILE)
    h_at = h_ptr + row * h_stride + f_F
    gate = tl.load(h_at, mask=f_F < F, other=0.0).to(tl.float32)
    up = tl.load(h_at + F, mask=f_F < F, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * F + f_F, gated(gate, up, y_ptr.dtype.element_ty), mask=f_F < F)


def launch(h_TG: Tensor) -> Tensor:
    """As `reference`; its exponential may differ in the last place."""
    check_tensor("h_TG", h_TG, (None, None), FLOATS, h_TG.device)
    num_rows, width = h_TG.shape
    require(width % 2 == 0, f"h_TG: {width} columns are not two halves")
    y_TF = torch.empty(num_rows, width // 2, dtype=h_TG.dtype, device=h_TG.device)
    if num_rows:
        grid = num_rows, -(-width // 2 // 1024)
        _swiglu[grid](h_TG, y_TF, width // 2, h_TG.stride(0), TILE=1024, num_warps=4, **OPTIONS)
    return y_TF


@dataclass(frozen=True, slots=True)
class Case:
    T: int
    F: int


CASES = [Case(T=t, F=f) for t in (0, 1, 64, 8192) for f in (2048, 2304)]


def cost(case: Case) -> Cost:
    return Cost(2 * 3 * case.T * case.F, 6 * case.T * case.F)
