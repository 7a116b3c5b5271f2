"""A matrix per head: y[t, h] = x[t, h] w[h]. Carries queries into the latent space and values out of it.

T tokens (may be 0), H heads, K inputs, N outputs. x and y share a dtype; sums are float32, rounded once. x is
never quantised. w is kv_b as the checkpoint means it; a set may keep it rounded to x's dtype (Triton's does).

    q_latent = q_nope W_UK    K = 128, N = 512           out = o_latent W_UV^T    K = 512, N = 128

Source: DeepSeek-V2 report, arXiv:2405.04434, section 2.1.2 (W_UK goes into W_Q, W_UV into W_O).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from k2kernels.arguments import FLOATS, check_tensor
from k2kernels.cost import Cost
from k2kernels.fp8_gemm import StoredWeight, dequantise
from k2kernels.jit import OPTIONS, jit_varying
from k2kernels.portable import dot, narrow
from k2kernels.product import BFLOAT16, PLAIN_FLOAT32, Tiles, choose_tiles, piece_of_k
from k2kernels.rows import TILE_ROWS, padded_rows

if TYPE_CHECKING:
    import triton.language as tl


def heads_of(kv_b: StoredWeight, num_heads: int, nope: int) -> tuple[list[StoredWeight], list[StoredWeight]]:
    """Each head's key rows [N, L] and its value rows [V, L], which follow them in kv_b.

    Views of what is stored, where scale blocks end with them; else dequantised, in float32.
    """
    of_head = len(kv_b.w_NK) // num_heads
    block = kv_b.block or 1
    if nope % block or of_head % block:
        kv_b, block = StoredWeight(dequantise(kv_b)), 1

    def rows(start: int, stop: int) -> StoredWeight:
        scale_nk = kv_b.scale_nk if kv_b.scale_nk is None else kv_b.scale_nk[start // block : stop // block]
        return StoredWeight(kv_b.w_NK[start:stop], scale_nk, kv_b.block)

    starts = [head * of_head for head in range(num_heads)]
    return (
        [rows(start, start + nope) for start in starts],
        [rows(start + nope, start + of_head) for start in starts],
    )


def prepare_keys(heads: Sequence[StoredWeight], dtype: torch.dtype = torch.float32) -> Tensor:
    """[H, N, L] of each head's key rows."""
    return torch.stack([dequantise(head).to(dtype) for head in heads])


def prepare_values(heads: Sequence[StoredWeight], dtype: torch.dtype = torch.float32) -> Tensor:
    """[H, L, V] of each head's value rows."""
    return prepare_keys(heads, dtype).transpose(1, 2).contiguous()


def reference(x_THK: Tensor, w_HKN: Tensor) -> Tensor:
    num_tokens, num_heads, _ = x_THK.shape
    y_THN = torch.empty(num_tokens, num_heads, w_HKN.shape[2], dtype=x_THK.dtype, device=x_THK.device)
    for first in range(0, num_tokens, TILE_ROWS):
        tile_IHK = padded_rows(x_THK[first : first + TILE_ROWS].float(), TILE_ROWS)
        y_HIN = torch.bmm(tile_IHK.transpose(0, 1).contiguous(), w_HKN)
        y_THN[first : first + TILE_ROWS] = y_HIN.transpose(0, 1)[: num_tokens - first]
    return y_THN


@jit_varying("T")
def _absorb(
    x_ptr,
    w_ptr,
    y_ptr,
    T,
    K,
    N,
    x_token_stride,
    x_head_stride,
    w_head_stride,
    y_token_stride,
    TILE_N: tl.constexpr,
    TILE_T: tl.constexpr,
    TILE_K: tl.constexpr,
):
    head = tl.program_id(2).to(tl.int64)
    n_N = tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)
    t_T = tl.program_id(0).to(tl.int64) * TILE_T + tl.arange(0, TILE_T)
    k_K = tl.arange(0, TILE_K)
    x_at = x_ptr + head * x_head_stride + tl.minimum(t_T, T - 1)[:, None] * x_token_stride + k_K[None, :]
    w_at = w_ptr + head * w_head_stride + n_N[:, None] + k_K[None, :] * N
    acc_NT = tl.zeros((TILE_N, TILE_T), dtype=tl.float32)
    for first_k in range(0, K, TILE_K):
        is_k = first_k + k_K < K
        x = tl.load(x_at, mask=is_k[None, :], other=0.0)
        w = tl.load(w_at, mask=is_k[None, :] & (n_N < N)[:, None], other=0.0)
        acc_NT = dot(w, tl.trans(x), acc_NT)
        x_at += TILE_K
        w_at += TILE_K * N
    y = narrow(tl.trans(acc_NT), y_ptr.dtype.element_ty)
    y_at = y_ptr + t_T[:, None] * y_token_stride + head * N + n_N[None, :]
    tl.store(y_at, y, mask=(t_T < T)[:, None] & (n_N < N)[None, :])


def launch(x_THK: Tensor, w_HKN: Tensor, tiles: Tiles | None = None) -> Tensor:
    """As `reference`, with w in x's dtype. `tiles`: any of `product.all_tiles` gives the same bits."""
    num_tokens, num_heads, num_inputs = x_THK.shape
    num_outputs = w_HKN.shape[2]
    check_tensor("x_THK", x_THK, (None, None, None), FLOATS, x_THK.device)
    shape = (num_heads, num_inputs, None)
    check_tensor("w_HKN", w_HKN, shape, (x_THK.dtype,), x_THK.device, dense_axes=3)
    y_THN = torch.empty(num_tokens, num_heads, num_outputs, dtype=x_THK.dtype, device=x_THK.device)
    if num_tokens == 0:
        return y_THN
    arithmetic = BFLOAT16 if x_THK.dtype == torch.bfloat16 else PLAIN_FLOAT32
    tiles = tiles or choose_tiles(arithmetic, num_tokens, num_heads * num_outputs)
    _absorb[-(-num_tokens // tiles.T), -(-num_outputs // tiles.N), num_heads](
        x_THK,
        w_HKN,
        y_THN,
        num_tokens,
        num_inputs,
        num_outputs,
        x_THK.stride(0),
        x_THK.stride(1),
        num_inputs * num_outputs,
        num_heads * num_outputs,
        TILE_N=tiles.N,
        TILE_T=tiles.T,
        TILE_K=piece_of_k(arithmetic, None),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        **OPTIONS,
    )
    return y_THN


@dataclass(frozen=True, slots=True)
class Case:
    T: int
    H: int
    K: int
    N: int


CASES = [
    Case(T=t, H=h, K=k, N=n) for t in (0, 1, 64, 256) for h in (8, 64) for k, n in ((128, 512), (512, 128))
]


def cost(case: Case) -> Cost:
    moved = case.H * (case.K * case.N + 2 * case.T * (case.K + case.N))  # weights as stored: a byte each
    return Cost(moved, 2 * case.T * case.H * case.K * case.N)
