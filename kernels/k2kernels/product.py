"""y = x w^T as Triton computes it: the kernel of `fp8_gemm`, `grouped_gemm` and `linear_bf16`, and its tiles.

Weights are the tensor core's first factor and rows of x its second: acc_NT = w_NK x_TK^T. The first factor
must have 64 rows on Hopper, the second may have 8 columns, so few rows of x cost few products, and every
number of them takes the same instruction (wgmma m64), which is what row invariance asks for.

One order along K, whatever the tile: K is cut in pieces of `TILE_K` from 0 on, their products are added in
ascending order, and no other program has a part of the sum. By arithmetic:

    scaled     e4m3 by e4m3, a piece is one scale block: acc = fma(piece, w scale * x scale, acc)
    bfloat16   the tensor core adds to its own accumulator
    float32    weights are dequantised first; fused multiply-adds, no tensor core

T rows of x, N outputs, K inputs; e slots, of which each has weights and, one after another, rows of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from k2kernels.act_quant import QuantisedRows
from k2kernels.arguments import E4M3, FLOAT32, FLOATS, check_tensor, require
from k2kernels.jit import OPTIONS, jit, jit_varying, next_power_of_2
from k2kernels.portable import dot, narrow

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


@dataclass(frozen=True, slots=True)
class Weights:
    """The other factor: [N, K], or [e, N, K] for rows by slot, as a checkpoint holds it; dense.

    `scale`: one for `row_block` outputs by `block` inputs, likewise with or without slots; None without.
    """

    w: Tensor
    scale: Tensor | None
    block: int | None
    row_block: int

    def check(self, device: torch.device) -> None:
        """ValueError: a kernel could not read them."""
        *slots, num_outputs, num_inputs = self.w.shape
        check_tensor("w.w", self.w, tuple(self.w.shape), WEIGHTS, device, dense_axes=self.w.dim())
        if self.scale is not None:
            shape = (*slots, -(-num_outputs // self.row_block), -(-num_inputs // (self.block or 1)))
            check_tensor("w.scale", self.scale, shape, FLOAT32, device, dense_axes=len(shape))


def launch(
    rows: Rows, weights: Weights, y: Tensor, tiles: Tiles, num_tiles: int, counts_e: Tensor | None = None
) -> None:
    """Fill `y` [T, N]; T is not 0. `num_tiles`: of rows, at most. `counts_e`: how many rows each slot has."""
    w, scale = weights.w, weights.scale
    num_outputs, num_inputs = w.shape[-2:]
    num_slots = 1 if counts_e is None else len(counts_e)
    tile_k = piece_of_k(rows.arithmetic, weights.block)
    _linear[-(-num_outputs // tiles.N) * num_tiles,](
        rows.x_TK,
        rows.scale_Tk,
        counts_e,
        w,
        scale,
        y,
        len(rows.x_TK),
        num_tiles,
        num_slots,
        num_outputs,
        num_inputs,
        rows.x_TK.stride(0),
        0 if rows.scale_Tk is None else rows.scale_Tk.stride(0),
        0 if scale is None else scale.stride(-2),
        0 if scale is None else scale.stride(0),
        BLOCK=weights.block or 1,
        ROW_BLOCK=weights.row_block,
        TILE_SLOTS=next_power_of_2(num_slots),
        TILE_N=tiles.N,
        TILE_T=tiles.T,
        TILE_K=tile_k,
        ARITHMETIC=rows.arithmetic,
        HAS_SLOTS=counts_e is not None,
        HAS_SCALES=scale is not None,
        IS_EVEN=num_inputs % tile_k == 0,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        **OPTIONS,
    )


@jit_varying("T", "num_tiles")
def _linear(
    x_ptr,
    x_scale_ptr,
    counts_ptr,
    w_ptr,
    w_scale_ptr,
    y_ptr,
    T,
    num_tiles,
    num_slots,
    N,
    K,
    x_stride,
    x_scale_stride,
    w_scale_stride,
    w_scale_slot_stride,
    BLOCK: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    TILE_SLOTS: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_T: tl.constexpr,
    TILE_K: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    IS_EVEN: tl.constexpr,
):
    tile, tile_n = place_of(tl.program_id(0), num_tiles, tl.cdiv(N, TILE_N))
    if HAS_SLOTS:
        # Counts stay on the device: every program finds its slot itself; those past the last tile have none.
        slot_e = tl.arange(0, TILE_SLOTS)
        count_e = tl.load(counts_ptr + slot_e, mask=slot_e < num_slots, other=0).to(tl.int32)
        tiles_e = (count_e + TILE_T - 1) // TILE_T
        slot = tl.sum((tl.cumsum(tiles_e, axis=0) <= tile).to(tl.int32), axis=0)
        if slot >= num_slots:
            return
        is_before_e = slot_e < slot
        first_t = tl.sum(tl.where(is_before_e, count_e, 0), axis=0)
        end_t = first_t + tl.sum(tl.where(slot_e == slot, count_e, 0), axis=0)
        first_t += (tile - tl.sum(tl.where(is_before_e, tiles_e, 0), axis=0)) * TILE_T
        w_ptr += slot.to(tl.int64) * N * K
        if HAS_SCALES:
            w_scale_ptr += slot.to(tl.int64) * w_scale_slot_stride
    else:
        first_t, end_t = tile * TILE_T, T

    first_n = tile_n * TILE_N
    n_N = first_n + tl.arange(0, TILE_N)
    t_T = first_t + tl.arange(0, TILE_T)
    acc_NT = tile_product(
        w_ptr,
        x_ptr,
        w_scale_ptr,
        x_scale_ptr,
        first_n,
        tl.minimum(n_N, N - 1).to(tl.int64),
        tl.minimum(t_T, end_t - 1).to(tl.int64),
        K,
        x_stride,
        w_scale_stride,
        x_scale_stride,
        BLOCK,
        ROW_BLOCK,
        TILE_N,
        TILE_T,
        TILE_K,
        ARITHMETIC,
        HAS_SCALES,
        IS_EVEN,
    )
    y = narrow(tl.trans(acc_NT), y_ptr.dtype.element_ty)
    is_in = (t_T < end_t)[:, None] & (n_N < N)[None, :]
    tl.store(y_ptr + t_T.to(tl.int64)[:, None] * N + n_N[None, :], y, mask=is_in)


@jit
def place_of(program, num_t, num_n):
    """Which tile of rows and which of outputs a program computes.

    `TOGETHER` tiles of rows take the same weights one after another, while these are in the L2 cache.
    """
    TOGETHER: tl.constexpr = 8
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
    w_at = w_ptr + n_N[:, None] * K + k_K[None, :]
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
