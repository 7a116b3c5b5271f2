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

import torch
from torch import Tensor
from torch.nn.functional import pad

from k2kernels import product
from k2kernels.act_quant import QuantisedRows
from k2kernels.arguments import require
from k2kernels.cost import Cost
from k2kernels.product import Rows, Tiles, choose_tiles
from k2kernels.rows import tiled_matmul


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


def launch(
    x: Tensor | QuantisedRows, w: Linear, out_dtype: torch.dtype, tiles: Tiles | None = None
) -> Tensor:
    """As `reference`. `tiles`: for tests and measurements; any of `product.all_tiles` gives the same bits."""
    require(isinstance(w, StoredLinear), f"w: {type(w).__name__}, expected what `prepare_stored` gives")
    assert isinstance(w, StoredLinear)
    num_outputs, num_inputs = w.w_NK.shape
    rows = Rows.of(x, w.w_NK.dtype, w.block, num_inputs)
    num_rows, device = len(rows.x_TK), rows.x_TK.device
    weights = product.Weights(w.w_NK, w.scale_nk, w.block, w.row_block)
    weights.check(device)
    y_TN = torch.empty(num_rows, num_outputs, dtype=out_dtype, device=device)
    if num_rows:
        tiles = tiles or choose_tiles(rows.arithmetic, num_rows, num_outputs)
        product.launch(rows, weights, y_TN, tiles, -(-num_rows // tiles.T))
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
