"""The router's logits in float32: x w^T with float32 weights.

T tokens (may be 0), D width, E experts. x: bfloat16 or float32; w and the result: float32. Half precision
here flips experts. Source: DeepSeek-V3, inference/model.py, Gate; k2_facts 2.5.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from k2kernels.arguments import FLOAT32, FLOATS, check_tensor
from k2kernels.cost import Cost
from k2kernels.jit import OPTIONS, jit_varying
from k2kernels.portable import dot, narrow
from k2kernels.rows import tiled_matmul

if TYPE_CHECKING:
    import triton.language as tl


def reference(x_TD: Tensor, w_ED: Tensor) -> Tensor:
    assert w_ED.dtype == torch.float32, f"the router's weights are float32, not {w_ED.dtype}"
    return tiled_matmul(x_TD, w_ED)


@jit_varying("T")
def _logits_part(
    x_ptr,
    w_ptr,
    part_ptr,
    T,
    E,
    D,
    x_stride,
    w_stride,
    TILE_E: tl.constexpr,
    TILE_T: tl.constexpr,
    TILE_D: tl.constexpr,
    PART_D: tl.constexpr,
):
    # A float32 weight is the sum of three bfloat16 numbers, exactly: so a tensor core gives the products of
    # float32 with a bfloat16 x. Small ones first.
    part = tl.program_id(2)
    t_T = tl.program_id(0).to(tl.int64) * TILE_T + tl.arange(0, TILE_T)
    e_E = tl.program_id(1) * TILE_E + tl.arange(0, TILE_E)
    d_D = part * PART_D + tl.arange(0, TILE_D)
    x_at = x_ptr + tl.minimum(t_T, T - 1)[:, None] * x_stride + d_D[None, :]
    w_at = w_ptr + tl.minimum(e_E, E - 1)[:, None] * w_stride + d_D[None, :]
    acc_ET = tl.zeros((TILE_E, TILE_T), dtype=tl.float32)
    for first_d in range(0, PART_D, TILE_D):
        is_d = (first_d + d_D < D)[None, :]
        x = tl.load(x_at + first_d, mask=is_d, other=0.0)
        w = tl.load(w_at + first_d, mask=is_d, other=0.0)
        if x_ptr.dtype.element_ty == tl.bfloat16:
            high = narrow(w, tl.bfloat16)
            rest = w - high.to(tl.float32)
            middle = narrow(rest, tl.bfloat16)
            low = narrow(rest - middle.to(tl.float32), tl.bfloat16)
            x = tl.trans(x)
            acc_ET = dot(low, x, acc_ET)
            acc_ET = dot(middle, x, acc_ET)
            acc_ET = dot(high, x, acc_ET)
        else:
            acc_ET = dot(w, tl.trans(x), acc_ET)
    at = (part * T + t_T)[:, None] * E + e_E[None, :]
    tl.store(part_ptr + at, tl.trans(acc_ET), mask=(t_T < T)[:, None] & (e_E < E)[None, :])


@jit_varying("N")
def _add_parts(part_ptr, y_ptr, N, num_parts, TILE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    total = tl.load(part_ptr + at, mask=at < N)
    for part in range(1, num_parts):
        total += tl.load(part_ptr + part * N + at, mask=at < N)
    tl.store(y_ptr + at, total, mask=at < N)


# Few experts and a long sum: K2's 384 x 7168 are 84 programs, for any number of rows, so that the parts and
# their order are the same for one row and for 4,096.
PART_D = 512
TILE_D = 64
TILE_E = 64
TILES_T = (16, 32, 64)


def launch(x_TD: Tensor, w_ED: Tensor, tile_t: int | None = None) -> Tensor:
    """As `reference`. Parts of 512 channels side by side, added in ascending order; any `TILES_T` alike."""
    check_tensor("x_TD", x_TD, (None, None), FLOATS, x_TD.device)
    num_tokens, width = x_TD.shape
    check_tensor("w_ED", w_ED, (None, width), FLOAT32, x_TD.device)
    num_experts = len(w_ED)
    y_TE = torch.empty(num_tokens, num_experts, dtype=torch.float32, device=x_TD.device)
    if num_tokens == 0:
        return y_TE
    num_parts = -(-width // PART_D)
    part_pTE = y_TE
    if num_parts > 1:
        part_pTE = torch.empty(num_parts, num_tokens, num_experts, dtype=torch.float32, device=x_TD.device)
    tile_t = tile_t or next((tile for tile in TILES_T if num_tokens <= tile), TILES_T[-1])
    _logits_part[-(-num_tokens // tile_t), -(-num_experts // TILE_E), num_parts](
        x_TD,
        w_ED,
        part_pTE,
        num_tokens,
        num_experts,
        width,
        x_TD.stride(0),
        w_ED.stride(0),
        TILE_E=TILE_E,
        TILE_T=tile_t,
        TILE_D=TILE_D,
        PART_D=PART_D,
        num_warps=4,
        num_stages=3,
        **OPTIONS,
    )
    if num_parts > 1:
        n = y_TE.numel()
        _add_parts[-(-n // 1024),](part_pTE, y_TE, n, num_parts, TILE=1024, num_warps=4, **OPTIONS)
    return y_TE


@dataclass(frozen=True, slots=True)
class Case:
    T: int
    E: int = 384
    D: int = 7168


CASES = [Case(T=t) for t in (0, 1, 64, 4096)]


def cost(case: Case) -> Cost:
    moved = 2 * case.T * case.D + 4 * case.E * case.D + 4 * case.T * case.E
    return Cost(moved, 2 * case.T * case.E * case.D)
