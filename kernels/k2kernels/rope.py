"""Rotary positions on interleaved pairs: (x[2i], x[2i+1]) turns by the angle of pair i.

    a' = a cos - b sin,  b' = b cos + a sin

T tokens (may be 0), H heads, R rotary width, F = R / 2 pairs. x and the result share a dtype; angles and
arithmetic are float32, rounded once. cos_TF, sin_TF: float32, of each token's position.
Source: Su et al. 2021, arXiv:2104.09864, eq. 15; the pairs are neighbours in K2's weights, not halves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from k2kernels.arguments import FLOAT32, FLOATS, check_tensor, require
from k2kernels.cost import Cost
from k2kernels.jit import OPTIONS, jit, next_power_of_2
from k2kernels.portable import narrow

if TYPE_CHECKING:
    import triton.language as tl


def reference(x_THR: Tensor, cos_TF: Tensor, sin_TF: Tensor) -> Tensor:
    a_THF, b_THF = x_THR[..., 0::2].float(), x_THR[..., 1::2].float()
    cos_T1F, sin_T1F = cos_TF[:, None], sin_TF[:, None]
    turned = (a_THF * cos_T1F - b_THF * sin_T1F, b_THF * cos_T1F + a_THF * sin_T1F)
    return torch.stack(turned, dim=-1).flatten(-2).to(x_THR.dtype)


@jit
def _rope(
    x_ptr,
    cos_ptr,
    sin_ptr,
    y_ptr,
    H,
    F,
    x_token_stride,
    x_head_stride,
    cos_stride,
    sin_stride,
    TILE_H: tl.constexpr,
    TILE_F: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    h_H, f_F = tl.program_id(1) * TILE_H + tl.arange(0, TILE_H), tl.arange(0, TILE_F)
    cos = tl.load(cos_ptr + token * cos_stride + f_F, mask=f_F < F, other=0.0)[None, :]
    sin = tl.load(sin_ptr + token * sin_stride + f_F, mask=f_F < F, other=0.0)[None, :]
    is_in = (h_H < H)[:, None] & (f_F < F)[None, :]
    x_at = x_ptr + token * x_token_stride + h_H[:, None] * x_head_stride + 2 * f_F[None, :]
    a = tl.load(x_at, mask=is_in, other=0.0).to(tl.float32)
    b = tl.load(x_at + 1, mask=is_in, other=0.0).to(tl.float32)
    y_at = y_ptr + (token * H + h_H[:, None]) * 2 * F + 2 * f_F[None, :]
    tl.store(y_at, narrow(a * cos - b * sin, y_ptr.dtype.element_ty), mask=is_in)
    tl.store(y_at + 1, narrow(b * cos + a * sin, y_ptr.dtype.element_ty), mask=is_in)


def launch(x_THR: Tensor, cos_TF: Tensor, sin_TF: Tensor) -> Tensor:
    """As `reference`, with the same bits."""
    check_tensor("x_THR", x_THR, (None, None, None), FLOATS, x_THR.device)
    num_tokens, num_heads, width = x_THR.shape
    require(width % 2 == 0, f"x_THR: {width} columns are not pairs")
    check_tensor("cos_TF", cos_TF, (num_tokens, width // 2), FLOAT32, x_THR.device)
    check_tensor("sin_TF", sin_TF, (num_tokens, width // 2), FLOAT32, x_THR.device)
    y_THR = torch.empty(num_tokens, num_heads, width, dtype=x_THR.dtype, device=x_THR.device)
    if num_tokens:
        tile_heads = min(16, next_power_of_2(num_heads))
        _rope[num_tokens, -(-num_heads // tile_heads)](
            x_THR,
            cos_TF,
            sin_TF,
            y_THR,
            num_heads,
            width // 2,
            x_THR.stride(0),
            x_THR.stride(1),
            cos_TF.stride(0),
            sin_TF.stride(0),
            TILE_H=tile_heads,
            TILE_F=next_power_of_2(width // 2),
            num_warps=2,
            **OPTIONS,
        )
    return y_THR


@dataclass(frozen=True, slots=True)
class Case:
    T: int
    H: int
    R: int = 64


CASES = [Case(T=t, H=h) for t in (0, 1, 64, 4096) for h in (1, 8, 64)]


def cost(case: Case) -> Cost:
    return Cost(case.T * case.R * (4 * case.H + 4), 3 * case.T * case.H * case.R)
