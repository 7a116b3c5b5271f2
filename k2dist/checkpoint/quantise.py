"""Block FP8: weights as float8 e4m3 with one float32 scale per 128 x 128 of them (k2_facts 2.7).

N rows, K columns; n = ceil(N / block), k = ceil(K / block). A short block at an edge has its own scale.
weight = float8.float() * scale, although the files call the scale `weight_scale_inv`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

E4M3_MAX = 448.0  # the largest finite float8_e4m3fn
SMALLEST_SCALE = 2.0**-126  # below it 1 / scale overflows float32; a block this small rounds to zero


def quantise_block_fp8(w_NK: Tensor, block: int = 128) -> tuple[Tensor, Tensor]:
    """The nearest float8 weights, and scale_nk float32 = largest magnitude of the block / 448.

    w_NK: any float dtype, finite. A block of zeros has scale 1. Raises `ValueError` for NaN or infinity.
    """
    num_rows, num_cols = w_NK.shape
    tiles_nbkb = _tiles(w_NK.float(), block)
    amax_nk = tiles_nbkb.abs().amax(dim=(1, 3))
    if not torch.isfinite(amax_nk).all():
        raise ValueError(f"weight {tuple(w_NK.shape)} holds NaN or infinity: nothing to scale by")
    scale_nk = torch.where(
        amax_nk > 0, (amax_nk / E4M3_MAX).clamp_min(SMALLEST_SCALE), torch.ones_like(amax_nk)
    )
    # Dividing may round just past 448, which the cast would turn into NaN.
    q_nbkb = (tiles_nbkb / scale_nk[:, None, :, None]).clamp(-E4M3_MAX, E4M3_MAX)
    q_NK = q_nbkb.flatten(2, 3).flatten(0, 1)[:num_rows, :num_cols]
    return q_NK.to(torch.float8_e4m3fn).contiguous(), scale_nk.contiguous()


def dequantise_block_fp8(q_NK: Tensor, scale_nk: Tensor, block: int = 128) -> Tensor:
    """The float32 weights that `q_NK` float8 and `scale_nk` stand for; exact but for one rounding."""
    num_rows, num_cols = q_NK.shape
    w_nbkb = _tiles(_float32(q_NK), block).mul_(scale_nk[:, None, :, None])
    return w_nbkb.flatten(2, 3).flatten(0, 1)[:num_rows, :num_cols].contiguous()


def _float32(q_NK: Tensor) -> Tensor:
    """A copy, as `q_NK.float()`: on a CPU five times as fast, since torch converts float8 one by one."""
    if q_NK.device.type != "cpu":
        return q_NK.float()
    of_code_C = torch.arange(256, dtype=torch.uint8).view(q_NK.dtype).float()
    return of_code_C.index_select(0, q_NK.view(torch.uint8).flatten().int()).view(q_NK.shape)


def _tiles(w_NK: Tensor, block: int) -> Tensor:
    """[n, block, k, block], the edges filled up with zeros; where there are none to fill, `w_NK` itself."""
    num_rows, num_cols = w_NK.shape
    n, k = -(-num_rows // block), -(-num_cols // block)
    if num_rows % block == num_cols % block == 0:
        return w_NK.reshape(n, block, k, block)
    return pad(w_NK, (0, k * block - num_cols, 0, n * block - num_rows)).view(n, block, k, block)
