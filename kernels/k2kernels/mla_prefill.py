"""Latent attention of prompt rows, decompressed: keys and values of every head are made from the latents.

    key[s, h] = [latent_s W_UK[h]^T | rotated key_s],  value[s, h] = latent_s W_UV[h]
    out[t, h] = sum over s <= start + t of softmax_s(q[t, h] . key[s, h] * scale) value[s, h]

T rows (may be 0) of one sequence at positions [start, start + T); H heads, N unrotated width, R rotary width,
L latent width, V value width, C cache places, P pages. The cached prefix and the rows' own keys are both read
from the cache, in its dtype; the causal mask is aligned bottom-right. q and out share a dtype, to which keys
and values are rounded; scores, softmax and sums are float32, rounded once. Cache places past the last row may
hold anything, NaN too.
Source: DeepSeek-V2 report, arXiv:2405.04434, section 2.1.2; k2_facts 2.1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from k2kernels import absorb
from k2kernels.attend import TILE_KEYS, attend, num_tiles, read_pages
from k2kernels.cost import Cost
from k2kernels.rows import TILE_ROWS, padded_rows


def reference(
    q_THD: Tensor,
    cache_CD: Tensor,
    page_P: Tensor,
    page_tokens: int,
    start: int,
    w_uk_HNL: Tensor,
    w_uv_HLV: Tensor,
    scale: float,
) -> Tensor:
    """`q_THD`: [q_nope | q_rope], D = N + R. Result: [T, H, V] in q's dtype."""
    num_rows, num_heads, _ = q_THD.shape
    out_THV = torch.empty(num_rows, num_heads, w_uv_HLV.shape[2], dtype=q_THD.dtype, device=q_THD.device)
    if num_rows == 0:
        return out_THV
    end = start + num_rows
    num_keys = num_tiles(end) * TILE_KEYS
    length_1 = torch.tensor([end], device=q_THD.device)
    latent_SD = read_pages(cache_CD, page_P[None], page_tokens, length_1, num_keys)[0]
    key_HnJD, value_HnJV = _decompress(latent_SD.to(q_THD.dtype), w_uk_HNL, w_uv_HLV)
    position_nJ = torch.arange(num_keys, device=q_THD.device).view(-1, TILE_KEYS)
    for first in range(0, num_rows, TILE_ROWS):
        rows = slice(first, first + TILE_ROWS)
        n = num_tiles(min(start + first + TILE_ROWS, end))
        q_HID = padded_rows(q_THD[rows].float(), TILE_ROWS).transpose(0, 1)
        row_I = torch.arange(TILE_ROWS, device=q_THD.device)[:, None] + start + first
        seen_1nIJ = (position_nJ[:n, None, :] <= row_I)[None]
        out_HIV = attend(q_HID, key_HnJD[:, :n], value_HnJV[:, :n], seen_1nIJ, scale)
        out_THV[rows] = out_HIV.transpose(0, 1)[: num_rows - first].to(q_THD.dtype)
    return out_THV


def _decompress(latent_SD: Tensor, w_uk_HNL: Tensor, w_uv_HLV: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of every head in float32, by tile: [H, n, 64, D] and [H, n, 64, V]."""
    num_heads, _, latent_width = w_uk_HNL.shape
    latent_SHL = latent_SD[:, None, :latent_width].expand(-1, num_heads, -1)
    rope_SHR = latent_SD[:, None, latent_width:].expand(-1, num_heads, -1)
    nope_SHN = absorb.reference(latent_SHL, w_uk_HNL.transpose(1, 2))
    key_SHD = torch.cat((nope_SHN, rope_SHR), dim=-1).float()
    value_SHV = absorb.reference(latent_SHL, w_uv_HLV).float()
    return _by_tile(key_SHD), _by_tile(value_SHV)


def _by_tile(x_SHD: Tensor) -> Tensor:
    num_keys, num_heads, width = x_SHD.shape
    return x_SHD.transpose(0, 1).reshape(num_heads, num_keys // TILE_KEYS, TILE_KEYS, width)


@dataclass(frozen=True, slots=True)
class Case:
    T: int
    start: int
    H: int = 8
    N: int = 128
    R: int = 64
    L: int = 512
    V: int = 128


CASES = [Case(T=t, start=s, H=h) for t in (0, 1, 2048) for s in (0, 100, 30000) for h in (8, 64)]


def cost(case: Case) -> Cost:
    """Each latent is decompressed once; the causal half of the last T x T scores is not computed."""
    num_keys, num_pairs = case.start + case.T, case.T * case.start + case.T * (case.T + 1) // 2
    num_flops = 2 * case.H * (num_keys * case.L * (case.N + case.V) + num_pairs * (case.N + case.R + case.V))
    moved = num_keys * (case.L + case.R) + case.T * case.H * (case.N + case.R + case.V)
    weights = case.H * case.L * (case.N + case.V)
    return Cost(2 * (moved + weights) if case.T else 0, num_flops if case.T else 0)
