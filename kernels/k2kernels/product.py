"""A tile of y = x w^T as Triton kernels compute it: what `fp8_gemm`, `grouped_gemm` and `linear_bf16` share.

Weights are the tensor core's first factor and rows of x its second: acc_NT = w_NK x_TK^T. The first factor
must have 64 rows on Hopper, the second may have 8 columns, so few rows of x cost few products, and every
number of them takes the same instruction (wgmma m64), which is what row invariance asks for.

One order along K, whatever the tile: K is cut in pieces of `TILE_K` from 0 on, their products are added in
ascending order, and no other program has a part of the sum. By arithmetic:

    scaled     e4m3 by e4m3, a piece is one scale block: acc = fma(piece, w scale * x scale, acc)
    bfloat16   the tensor core adds to its own accumulator
    float32    weights are dequantised first; fused multiply-adds, no tensor core

T rows of x, N outputs, K inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from k2kernels.act_quant import QuantisedRows
from k2kernels.arguments import E4M3, FLOAT32, FLOATS, check_tensor, require
from k2kernels.jit import jit
from k2kernels.portable import dot

if TYPE_CHECKING:
    import triton.language as tl

SCALED, BFLOAT16, PLAIN_FLOAT32 = "scaled", "bfloat16", "float32"
WEIGHTS = (*E4M3, *FLOATS)


@dataclass(frozen=True, slots=True)
class Tiles:
    """What a program computes, N outputs of T rows, and how: nothing here may move a bit of the result."""

    N: int
    T: int
    warps: int
    stages: int


# By arithmetic: the pieces of K in elements (of `scaled`, the scale block) and the tiles to choose from, with
# the most rows that each is for. 128 x 128 with 4 warps would keep 256 sums a thread: 8.
_PIECE = {BFLOAT16: 64, PLAIN_FLOAT32: 32}
TILES = {
    SCALED: ((16, Tiles(128, 16, 4, 5)), (32, Tiles(128, 32, 4, 5)), (64, Tiles(128, 64, 4, 4))),
    BFLOAT16: ((16, Tiles(128, 16, 4, 5)), (32, Tiles(128, 32, 4, 5)), (64, Tiles(128, 64, 4, 4))),
    PLAIN_FLOAT32: ((16, Tiles(64, 16, 4, 2)),),
}
LARGEST = {
    SCALED: Tiles(128, 128, 8, 4),
    BFLOAT16: Tiles(128, 128, 8, 4),
    PLAIN_FLOAT32: Tiles(64, 64, 4, 2),
}
NARROW = 132 * 128  # outputs that give every processor of an H200 a tile of 128; below it tiles have 64


def choose_tiles(arithmetic: str, num_rows: int, num_outputs: int) -> Tiles:
    """The tile for `num_rows` rows (of one expert, on average) and all of a product's outputs."""
    for most_rows, tiles in TILES[arithmetic]:
        if num_rows <= most_rows:
            return Tiles(64, tiles.T, tiles.warps, tiles.stages) if num_outputs < NARROW else tiles
    return LARGEST[arithmetic]


def all_tiles(arithmetic: str) -> list[Tiles]:
    """Every tile that `choose_tiles` may give."""
    sizes = [*(most_rows for most_rows, _ in TILES[arithmetic]), 1 << 20]
    return list(
        dict.fromkeys(choose_tiles(arithmetic, rows, outputs) for rows in sizes for outputs in (1, NARROW))
    )


def piece_of_k(arithmetic: str, block: int | None) -> int:
    """TILE_K: elements of K whose products are summed before they join the sum."""
    if arithmetic == SCALED:
        assert block is not None, "scaled products have scales"
        return block
    piece = _PIECE[arithmetic]
    return piece if block is None else gcd(piece, block)


@dataclass(frozen=True, slots=True)
class Rows:
    """One factor as a kernel takes it, and the arithmetic that it and the weights are for."""

    x_TK: Tensor
    scale_Tk: Tensor | None
    arithmetic: str

    @classmethod
    def of(cls, x: Tensor | QuantisedRows, w_dtype: torch.dtype, block: int | None, num_inputs: int) -> Rows:
        """ValueError: these rows and weights do not go together."""
        if isinstance(x, Tensor):
            check_tensor("x", x, (None, num_inputs), FLOATS, x.device)
            is_bfloat16 = x.dtype == w_dtype == torch.bfloat16
            return cls(x, None, BFLOAT16 if is_bfloat16 else PLAIN_FLOAT32)
        num_tokens, device = len(x.q_TK), x.q_TK.device
        require(block is not None, "x: quantised, and the weights have no scales")
        assert block is not None
        require(x.block == block, f"x: scales of {x.block} channels, the weights' of {block}")
        require(
            32 <= block <= 256 and block & (block - 1) == 0,
            f"w.block: {block}; a scale block is a power of two from 32 to 256",
        )
        check_tensor("x.q_TK", x.q_TK, (None, num_inputs), E4M3, device)
        check_tensor("x.scale_Tk", x.scale_Tk, (num_tokens, -(-num_inputs // block)), FLOAT32, device)
        return cls(x.q_TK, x.scale_Tk, SCALED)


@jit
def place_of(program, num_t, num_n, TOGETHER: tl.constexpr):
    """Which tile of rows and which of outputs a program computes.

    `TOGETHER` tiles of rows take the same weights one after another, while these are in the L2 cache.
    """
    first = program // (num_n * TOGETHER) * TOGETHER
    num_together = tl.minimum(num_t - first, TOGETHER)
    within = program % (num_n * TOGETHER)
    return first + within % num_together, within // num_together


@jit
def tile_product(
    w_ptr,
    x_ptr,
    w_scale_ptr,
    x_scale_ptr,
    first_n,
    n_N,
    t_T,
    K,
    w_stride,
    x_stride,
    w_scale_stride,
    x_scale_stride,
    BLOCK: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_T: tl.constexpr,
    TILE_K: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    IS_EVEN: tl.constexpr,
):
    """float32 [TILE_N, TILE_T]: outputs `n_N` (int64, from `first_n` on) of rows `t_T` (int64).

    All of `n_N` and `t_T` must be there to read: who asks gives the last one again where his tile ends.
    `IS_EVEN`: TILE_K divides K. BLOCK: inputs, ROW_BLOCK: outputs that share a scale.
    """
    k_K = tl.arange(0, TILE_K)
    w_at = w_ptr + n_N[:, None] * w_stride + k_K[None, :]
    x_at = x_ptr + t_T[:, None] * x_stride + k_K[None, :]
    acc = tl.zeros((TILE_N, TILE_T), dtype=tl.float32)
    for first_k in range(0, K, TILE_K):
        if IS_EVEN:
            w = tl.load(w_at)
            x = tl.load(x_at)
        else:
            is_k = (first_k + k_K < K)[None, :]
            w = tl.load(w_at, mask=is_k, other=0.0)
            x = tl.load(x_at, mask=is_k, other=0.0)
        if HAS_SCALES:
            w_scale_at = w_scale_ptr + first_k // BLOCK
            if ROW_BLOCK % TILE_N == 0:
                w_scale = tl.load(w_scale_at + first_n // ROW_BLOCK * w_scale_stride)
            else:
                w_scale = tl.load(w_scale_at + n_N // ROW_BLOCK * w_scale_stride)[:, None]
        if ARITHMETIC == "scaled":
            x_scale = tl.load(x_scale_ptr + t_T * x_scale_stride + first_k // BLOCK)[None, :]
            scale = tl.broadcast_to(w_scale * x_scale, (TILE_N, TILE_T))
            acc = tl.fma(tl.dot(w, tl.trans(x)), scale, acc)
        elif ARITHMETIC == "bfloat16":
            acc = dot(w, tl.trans(x), acc)
        else:
            w = w.to(tl.float32)
            if HAS_SCALES:
                w = w * w_scale
            acc = dot(w, tl.trans(x.to(tl.float32)), acc)
        w_at += TILE_K
        x_at += TILE_K
    return acc
