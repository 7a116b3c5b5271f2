"""A linear with block-FP8 weights: y = x w^T, weight = e4m3 * scale of its 128 x 128 block.

    x as QuantisedRows    both factors are float8 with their scales (W8A8): what is served
    x as a float tensor   only the weights are quantised: what is compared with other implementations

T tokens (may be 0), N outputs, K inputs, n = ceil(N / block), k = ceil(K / block); short blocks at the edges
have their own scale (kv_a: 576 rows, 5 scales). Sums are float32 along K; y is rounded once, to `out_dtype`.
The file calls the scale `weight_scale_inv`; it is multiplied. Unquantised weights (no scale) are bfloat16.
Source: DeepSeek-V3, inference/kernel.py, fp8_gemm and weight_dequant; README_WEIGHTS.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from k2kernels.act_quant import QuantisedRows
from k2kernels.arguments import FLOAT32, check_tensor, require
from k2kernels.cost import Cost
from k2kernels.jit import OPTIONS, jit_varying
from k2kernels.portable import narrow
from k2kernels.product import WEIGHTS, Rows, Tiles, choose_tiles, piece_of_k, place_of, tile_product
from k2kernels.rows import tiled_matmul

if TYPE_CHECKING:
    import triton.language as tl


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """A weight as a checkpoint holds it: e4m3 with scales, or a float tensor and no scale."""

    w_NK: Tensor
    scale_nk: Tensor | None = None
    block: int | None = None  # of the scales; None without them

    def __post_init__(self) -> None:
        assert (self.scale_nk is None) == (self.block is None), "scales and their block come together"


@dataclass(frozen=True, slots=True)
class Linear:
    """The reference's layout: dequantised float32 weights. `block`: of the activations' scales, if any."""

    w_NK: Tensor
    block: int | None


def dequantise(weight: StoredWeight) -> Tensor:
    """The float32 weights that are meant: [N, K]."""
    if weight.scale_nk is None or weight.block is None:
        return weight.w_NK.float()
    (num_rows, num_cols), block = weight.w_NK.shape, weight.block
    n, k = weight.scale_nk.shape
    assert (n, k) == (-(-num_rows // block), -(-num_cols // block)), (
        f"scales [{n}, {k}] for a weight [{num_rows}, {num_cols}] in blocks of {block}"
    )
    w_nbkb = pad(weight.w_NK.float(), (0, k * block - num_cols, 0, n * block - num_rows)).view(
        n, block, k, block
    )
    scaled_nbkb = w_nbkb * weight.scale_nk[:, None, :, None]
    return scaled_nbkb.reshape(n * block, k * block)[:num_rows, :num_cols].contiguous()


def prepare(parts: Sequence[StoredWeight]) -> Linear:
    """One linear whose outputs are those of `parts`, one after another (gate and up; q_a and kv_a)."""
    block = parts[0].block
    assert all(part.block == block for part in parts), "parts of one linear are quantised alike"
    return Linear(torch.cat([dequantise(part) for part in parts]), block)


def reference(x: Tensor | QuantisedRows, w: Linear, out_dtype: torch.dtype) -> Tensor:
    return tiled_matmul(x.float(), w.w_NK).to(out_dtype)


@dataclass(frozen=True, slots=True)
class StoredLinear(Linear):
    """The Triton kernels' layout: `w_NK` as it is stored. `row_block`: outputs that share a scale."""

    scale_nk: Tensor | None
    row_block: int


def prepare_stored(parts: Sequence[StoredWeight]) -> StoredLinear:
    """As `prepare`. Where a part ends inside a scale block, scales repeat for shorter blocks of rows."""
    block = parts[0].block
    require(all(part.block == block for part in parts), "parts: quantised unlike each other")
    dtypes = {part.w_NK.dtype for part in parts}
    require(len(dtypes) == 1, f"parts: of several dtypes, {sorted(map(str, dtypes))}")
    w_NK = parts[0].w_NK.contiguous()
    if len(parts) > 1:  # as bytes: torch cannot concatenate every float8
        w_NB = torch.cat([part.w_NK.contiguous().view(torch.uint8) for part in parts])
        w_NK = w_NB.view(w_NK.dtype)
    if block is None:
        return StoredLinear(w_NK, None, None, 1)
    row_block = gcd(block, *(len(part.w_NK) for part in parts[:-1]))
    scale_nk = torch.cat([_scales_by(row_block, part) for part in parts])
    return StoredLinear(w_NK, block, scale_nk, row_block)


def _scales_by(row_block: int, part: StoredWeight) -> Tensor:
    """The part's scales with one row for every `row_block` of its outputs."""
    assert part.scale_nk is not None, "a quantised part has scales"
    assert part.block is not None, "scales and their block come together"
    scale_nk = part.scale_nk.float().repeat_interleave(part.block // row_block, dim=0)
    return scale_nk[: -(-len(part.w_NK) // row_block)]


@jit_varying("T")
def _linear(
    x_ptr,
    x_scale_ptr,
    w_ptr,
    w_scale_ptr,
    y_ptr,
    T,
    N,
    K,
    x_stride,
    x_scale_stride,
    w_scale_stride,
    BLOCK: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_T: tl.constexpr,
    TILE_K: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    IS_EVEN: tl.constexpr,
):
    tile_t, tile_n = place_of(tl.program_id(0), tl.cdiv(T, TILE_T), tl.cdiv(N, TILE_N), 8)
    first_t, first_n = tile_t * TILE_T, tile_n * TILE_N
    n_N = first_n + tl.arange(0, TILE_N)
    t_T = first_t + tl.arange(0, TILE_T)
    acc_NT = tile_product(
        w_ptr,
        x_ptr,
        w_scale_ptr,
        x_scale_ptr,
        first_n,
        tl.minimum(n_N, N - 1).to(tl.int64),
        tl.minimum(t_T, T - 1).to(tl.int64),
        K,
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
    is_in = (t_T < T)[:, None] & (n_N < N)[None, :]
    tl.store(y_ptr + t_T.to(tl.int64)[:, None] * N + n_N[None, :], y, mask=is_in)


def launch(
    x: Tensor | QuantisedRows, w: Linear, out_dtype: torch.dtype, tiles: Tiles | None = None
) -> Tensor:
    """As `reference`. `tiles`: for tests and measurements; any of `product.all_tiles` gives the same bits."""
    require(isinstance(w, StoredLinear), f"w: {type(w).__name__}, expected what `prepare_stored` gives")
    assert isinstance(w, StoredLinear)
    num_outputs, num_inputs = w.w_NK.shape
    rows = Rows.of(x, w.w_NK.dtype, w.block, num_inputs)
    num_rows, device = len(rows.x_TK), rows.x_TK.device
    check_tensor("w.w_NK", w.w_NK, (num_outputs, num_inputs), WEIGHTS, device, dense_axes=2)
    if w.scale_nk is not None:
        shape = (-(-num_outputs // w.row_block), -(-num_inputs // (w.block or 1)))
        check_tensor("w.scale_nk", w.scale_nk, shape, FLOAT32, device, dense_axes=2)
    y_TN = torch.empty(num_rows, num_outputs, dtype=out_dtype, device=device)
    if num_rows == 0:
        return y_TN
    tiles = tiles or choose_tiles(rows.arithmetic, num_rows, num_outputs)
    tile_k = piece_of_k(rows.arithmetic, w.block)
    _linear[-(-num_outputs // tiles.N) * -(-num_rows // tiles.T),](
        rows.x_TK,
        rows.scale_Tk,
        w.w_NK,
        w.scale_nk,
        y_TN,
        num_rows,
        num_outputs,
        num_inputs,
        rows.x_TK.stride(0),
        0 if rows.scale_Tk is None else rows.scale_Tk.stride(0),
        0 if w.scale_nk is None else w.scale_nk.stride(0),
        BLOCK=w.block or 1,
        ROW_BLOCK=w.row_block,
        TILE_N=tiles.N,
        TILE_T=tiles.T,
        TILE_K=tile_k,
        ARITHMETIC=rows.arithmetic,
        HAS_SCALES=w.scale_nk is not None,
        IS_EVEN=num_inputs % tile_k == 0,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        **OPTIONS,
    )
    return y_TN


@dataclass(frozen=True, slots=True)
class Case:
    T: int
    N: int
    K: int


# q_a with kv_a, q_b, o_proj of 8 heads at tp 8; dense and shared MLPs.
SHAPES = [(2112, 7168), (1536, 1536), (7168, 1024), (4608, 7168), (7168, 2304), (4096, 7168), (7168, 2048)]
CASES = [Case(T=t, N=n, K=k) for t in (0, 1, 16, 128, 4096) for n, k in SHAPES]


def cost(case: Case) -> Cost:
    num_scales = -(-case.N // 128) * -(-case.K // 128) + case.T * -(-case.K // 128)
    moved = case.N * case.K + case.T * case.K + 4 * num_scales + 2 * case.T * case.N
    return Cost(moved, 2 * case.T * case.N * case.K)
