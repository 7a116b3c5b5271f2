"""Dynamic float8 quantisation of activations: one scale per token and `block` contiguous channels.

    scale = max(|x|, 1e-4) / 448 over the group,  q = x / scale rounded to the nearest e4m3 (ties to even)

T tokens (may be 0), K channels, k = ceil(K / block) groups; a short last group has its own scale.
x: bfloat16 or float32. q: float8_e4m3fn, scale: float32. Zeros give q = 0; NaN makes its group NaN.
Source: DeepSeek-V3, inference/kernel.py, act_quant (arXiv:2412.19437, section 3.3.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from k2kernels.arguments import E4M3, FLOAT32, FLOATS, check_tensor, require
from k2kernels.cost import Cost
from k2kernels.e4m3 import e4m3_byte, group_scale
from k2kernels.jit import OPTIONS, jit, next_power_of_2

if TYPE_CHECKING:
    import triton.language as tl

E4M3_MAX = 448.0
SMALLEST_AMAX = 1e-4


@dataclass(frozen=True, slots=True)
class QuantisedRows:
    """Rows of float8 with their scales; the value is q * scale."""

    q_TK: Tensor
    scale_Tk: Tensor
    block: int

    def float(self) -> Tensor:
        """The float32 values that the rows stand for: [T, K]."""
        num_tokens, num_groups = self.scale_Tk.shape
        grouped_TkG = _grouped(self.q_TK.float(), self.block) * self.scale_Tk[:, :, None]
        return grouped_TkG.reshape(num_tokens, num_groups * self.block)[:, : self.q_TK.shape[1]]

    def __getitem__(self, row_M: Tensor) -> QuantisedRows:
        """The rows numbered `row_M`, in that order. Bytes are moved: torch cannot index every float8."""
        q_MK = self.q_TK.view(torch.uint8)[row_M].view(self.q_TK.dtype)
        return QuantisedRows(q_MK, self.scale_Tk[row_M], self.block)


def reference(x_TK: Tensor, block: int) -> QuantisedRows:
    num_tokens, num_channels = x_TK.shape
    grouped_TkG = _grouped(x_TK.float(), block)
    scale_Tk = grouped_TkG.abs().amax(-1).clamp_min(SMALLEST_AMAX) / E4M3_MAX
    # Dividing may round just past 448, which the cast would turn into NaN.
    q_TkG = (grouped_TkG / scale_Tk[:, :, None]).clamp(-E4M3_MAX, E4M3_MAX)
    q_TK = q_TkG.reshape(num_tokens, scale_Tk.shape[1] * block)[:, :num_channels].contiguous()
    return QuantisedRows(q_TK.to(torch.float8_e4m3fn), scale_Tk, block)


def _grouped(x_TK: Tensor, block: int) -> Tensor:
    """[T, k, block], the last group filled up with zeros."""
    num_tokens, num_channels = x_TK.shape
    num_groups = -(-num_channels // block)
    return pad(x_TK, (0, num_groups * block - num_channels)).view(num_tokens, num_groups, block)


@jit
def _act_quant(
    x_ptr,
    q_ptr,
    scale_ptr,
    x_stride,
    q_stride,
    scale_stride,
    K,
    amax_floor,
    BLOCK: tl.constexpr,
    TILE_BLOCK: tl.constexpr,
    TILE_GROUPS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * TILE_GROUPS + tl.arange(0, TILE_GROUPS)
    channel = tl.arange(0, TILE_BLOCK)
    at = group[:, None] * BLOCK + channel[None, :]
    is_in = (channel < BLOCK)[None, :] & (at < K)
    x = tl.load(x_ptr + row * x_stride + at, mask=is_in, other=0.0).to(tl.float32)
    scale = group_scale(x, amax_floor)
    byte = e4m3_byte(tl.div_rn(x, scale[:, None]))
    tl.store(q_ptr + row * q_stride + at, byte.to(tl.uint8), mask=is_in)
    tl.store(scale_ptr + row * scale_stride + group, scale, mask=group * BLOCK < K)


TILE_GROUPS = 8  # of 128: 8 channels a thread


def launch(x_TK: Tensor, block: int) -> QuantisedRows:
    """As `reference`, with the same bits."""
    require(x_TK.dim() == 2, f"x_TK: {x_TK.dim()} axes, expected 2")
    num_tokens, num_channels = x_TK.shape
    q_TK = torch.empty(num_tokens, num_channels, dtype=torch.float8_e4m3fn, device=x_TK.device)
    num_groups = -(-num_channels // block)
    scale_Tk = torch.empty(num_tokens, num_groups, dtype=torch.float32, device=x_TK.device)
    launch_into_(q_TK, scale_Tk, x_TK, block)
    return QuantisedRows(q_TK, scale_Tk, block)


def launch_into_(q_TK: Tensor, scale_Tk: Tensor, x_TK: Tensor, block: int) -> None:
    """Quantise to where the rows are wanted; rows may lie apart."""
    num_tokens, num_channels = x_TK.shape
    num_groups = -(-num_channels // block)
    check_tensor("x_TK", x_TK, (None, None), FLOATS, x_TK.device)
    check_tensor("q_TK", q_TK, (num_tokens, num_channels), E4M3, x_TK.device)
    check_tensor("scale_Tk", scale_Tk, (num_tokens, num_groups), FLOAT32, x_TK.device)
    if num_tokens == 0:
        return
    _act_quant[num_tokens, -(-num_groups // TILE_GROUPS)](
        x_TK,
        q_TK.view(torch.uint8),
        scale_Tk,
        x_TK.stride(0),
        q_TK.stride(0),
        scale_Tk.stride(0),
        num_channels,
        SMALLEST_AMAX,
        BLOCK=block,
        TILE_BLOCK=next_power_of_2(block),
        TILE_GROUPS=TILE_GROUPS,
        num_warps=4,
        **OPTIONS,
    )


@dataclass(frozen=True, slots=True)
class Case:
    T: int
    K: int


CASES = [Case(T=t, K=k) for t in (0, 1, 64, 4096) for k in (512, 1536, 2048, 7168, 18432)]


def cost(case: Case) -> Cost:
    num_groups = -(-case.K // 128)
    return Cost(case.T * (case.K * 3 + num_groups * 4), 3 * case.T * case.K)
