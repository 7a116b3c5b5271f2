"""Latent attention of generated rows, absorbed: queries meet the cached latents themselves.

    out[r, h] = sum over s < length_r of softmax_s((q_latent . latent_s + q_rope . key_s) * scale) latent_s

R rows (may be 0; several may be of one sequence), H heads, L latent width, D = L + rotary width (a query is
[q_latent | q_rope], a cached row [latent | rotated key]), C cache places, P pages of the longest table. q and
out share a dtype; keys are read in the cache's dtype; scores, softmax and sums are float32, rounded once.
`length_R` >= 1: keys visible, the row's own included. `scale` is of the unabsorbed width (192). Cache places
and table entries past a row's length may hold anything, NaN too.
Source: DeepSeek-V2 report, arXiv:2405.04434, section 2.1.2; k2_facts 2.2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from k2kernels.attend import TILE_KEYS, attend, num_tiles, read_pages
from k2kernels.cost import Cost

MAX_TILES = 512  # of key tiles gathered at once: 75 MB of float32 at K2's 576 columns


def reference(
    q_RHD: Tensor,
    cache_CD: Tensor,
    page_RP: Tensor,
    page_tokens: int,
    length_R: Tensor,
    latent_width: int,
    scale: float,
) -> Tensor:
    """Result: [R, H, L] in q's dtype."""
    num_rows, num_heads, _ = q_RHD.shape
    out_RHL = torch.empty(num_rows, num_heads, latent_width, dtype=q_RHD.dtype, device=q_RHD.device)
    if num_rows == 0:
        return out_RHL
    n = num_tiles(int(length_R.max()))
    rows_at_once = max(1, MAX_TILES // n)
    for first in range(0, num_rows, rows_at_once):
        rows = slice(first, first + rows_at_once)
        key_RSD = read_pages(cache_CD, page_RP[rows], page_tokens, length_R[rows], n * TILE_KEYS)
        key_RnJD = key_RSD.view(len(key_RSD), n, TILE_KEYS, key_RSD.shape[2])
        position_n1J = torch.arange(n * TILE_KEYS, device=q_RHD.device).view(n, 1, TILE_KEYS)
        seen_Rn1J = position_n1J < length_R[rows, None, None, None]
        value_RnJL = key_RnJD[..., :latent_width].contiguous()
        out_RHL[rows] = attend(q_RHD[rows].float(), key_RnJD, value_RnJL, seen_Rn1J, scale).to(q_RHD.dtype)
    return out_RHL


@dataclass(frozen=True, slots=True)
class Case:
    R: int
    num_keys: int
    H: int = 8
    L: int = 512
    D: int = 576


CASES = [Case(R=r, num_keys=s, H=h) for r in (0, 1, 64) for s in (1, 1024, 131072) for h in (8, 64)]


def cost(case: Case) -> Cost:
    moved = 2 * case.R * (case.num_keys * case.D + case.H * (case.D + case.L))
    return Cost(moved, 2 * case.R * case.H * case.num_keys * (case.D + case.L))
