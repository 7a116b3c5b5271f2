"""SwiGLU's middle, quantised for the linear that follows: `act_quant(swiglu(h))` in one pass over h.

T rows (may be 0), F width, h = [gate | up]. y is rounded to h's dtype before it is quantised, so the bits are
those of the two ops one after the other. Source: as `swiglu` and `act_quant`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from k2kernels import act_quant, swiglu
from k2kernels.act_quant import SMALLEST_AMAX, TILE_GROUPS, QuantisedRows
from k2kernels.arguments import FLOATS, check_tensor, require
from k2kernels.cost import Cost
from k2kernels.e4m3 import e4m3_byte, group_scale
from k2kernels.jit import OPTIONS, jit, next_power_of_2
from k2kernels.swiglu import gated

if TYPE_CHECKING:
    import triton.language as tl


def reference(h_TG: Tensor, block: int) -> QuantisedRows:
    """`h_TG`: [T, 2F]. Result: rows of F in groups of `block`."""
    return act_quant.reference(swiglu.reference(h_TG), block)


@jit
def _swiglu_quant(
    h_ptr,
    q_ptr,
    scale_ptr,
    F,
    num_groups,
    h_stride,
    amax_floor,
    BLOCK: tl.constexpr,
    TILE_BLOCK: tl.constexpr,
    TILE_GROUPS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * TILE_GROUPS + tl.arange(0, TILE_GROUPS)
    channel = tl.arange(0, TILE_BLOCK)
    at = group[:, None] * BLOCK + channel[None, :]
    is_in = (channel < BLOCK)[None, :] & (at < F)
    h_at = h_ptr + row * h_stride + at
    gate = tl.load(h_at, mask=is_in, other=0.0).to(tl.float32)
    up = tl.load(h_at + F, mask=is_in, other=0.0).to(tl.float32)
    y = gated(gate, up, h_ptr.dtype.element_ty).to(tl.float32)
    scale = group_scale(y, amax_floor)
    byte = e4m3_byte(tl.div_rn(y, scale[:, None]))
    tl.store(q_ptr + row * F + at, byte.to(tl.uint8), mask=is_in)
    tl.store(scale_ptr + row * num_groups + group, scale, mask=group < num_groups)


def launch(h_TG: Tensor, block: int) -> QuantisedRows:
    """As `reference`; its exponential may differ in the last place."""
    check_tensor("h_TG", h_TG, (None, None), FLOATS, h_TG.device)
    num_rows, width = h_TG.shape[0], h_TG.shape[1] // 2
    require(h_TG.shape[1] % 2 == 0, f"h_TG: {h_TG.shape[1]} columns are not two halves")
    num_groups = -(-width // block)
    q_TF = torch.empty(num_rows, width, dtype=torch.float8_e4m3fn, device=h_TG.device)
    scale_Tf = torch.empty(num_rows, num_groups, dtype=torch.float32, device=h_TG.device)
    if num_rows:
        _swiglu_quant[num_rows, -(-num_groups // TILE_GROUPS)](
            h_TG,
            q_TF.view(torch.uint8),
            scale_Tf,
            width,
            num_groups,
            h_TG.stride(0),
            SMALLEST_AMAX,
            BLOCK=block,
            TILE_BLOCK=next_power_of_2(block),
            TILE_GROUPS=TILE_GROUPS,
            num_warps=4,
            **OPTIONS,
        )
    return QuantisedRows(q_TF, scale_Tf, block)


@dataclass(frozen=True, slots=True)
class Case:
    T: int
    F: int


CASES = [Case(T=t, F=f) for t in (0, 1, 64, 8192) for f in (2048, 2304)]


def cost(case: Case) -> Cost:
    num_groups = -(-case.F // 128)
    return Cost(case.T * (5 * case.F + 4 * num_groups), 9 * case.T * case.F)
