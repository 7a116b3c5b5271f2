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
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from k2kernels import absorb
from k2kernels.arguments import FLOATS, INT64, check_tensor, require
from k2kernels.attend import LOG2_E, TILE_KEYS, attend, num_tiles, read_pages, rows_of_keys
from k2kernels.cost import Cost
from k2kernels.jit import OPTIONS, jit_varying, next_power_of_2
from k2kernels.portable import dot, narrow
from k2kernels.rows import TILE_ROWS, padded_rows

if TYPE_CHECKING:
    import triton.language as tl


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


@jit_varying("end", "num_keys", "page_ptr")
def _decompress_keys(
    cache_ptr,
    page_ptr,
    w_uk_ptr,
    w_uv_ptr,
    key_ptr,
    value_ptr,
    end,
    num_keys,
    page_tokens,
    CACHE_STRIDE: tl.constexpr,
    NOPE: tl.constexpr,
    VALUE: tl.constexpr,
    LATENT: tl.constexpr,
    TILE_NOPE: tl.constexpr,
    TILE_VALUE: tl.constexpr,
    TILE_LATENT: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    IN_ONE_PAGE: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    first_key = tl.program_id(0) * TILE_KEYS
    latent_at, is_key = rows_of_keys(
        cache_ptr, page_ptr, first_key, end, page_tokens, CACHE_STRIDE, TILE_KEYS, IN_ONE_PAGE
    )
    n_N, v_V, l_L = tl.arange(0, TILE_NOPE), tl.arange(0, TILE_VALUE), tl.arange(0, TILE_LATENT)
    uk_at = w_uk_ptr + head * NOPE * LATENT + n_N[:, None] * LATENT
    uv_at = w_uv_ptr + head * LATENT * VALUE + v_V[None, :]
    key_SN = tl.zeros((TILE_KEYS, TILE_NOPE), dtype=tl.float32)
    value_SV = tl.zeros((TILE_KEYS, TILE_VALUE), dtype=tl.float32)
    for first_l in range(0, LATENT, TILE_LATENT):
        at_L = first_l + l_L
        is_l = at_L < LATENT
        latent = tl.load(latent_at + at_L[None, :], mask=is_key[:, None] & is_l[None, :], other=0.0)
        uk_NL = tl.load(uk_at + at_L[None, :], mask=(n_N < NOPE)[:, None] & is_l[None, :], other=0.0)
        uv_LV = tl.load(uv_at + at_L[:, None] * VALUE, mask=is_l[:, None] & (v_V < VALUE)[None, :], other=0.0)
        key_SN = dot(latent, tl.trans(uk_NL), key_SN)
        value_SV = dot(latent, uv_LV, value_SV)
    at_S = (
        head * num_keys + first_key + tl.arange(0, TILE_KEYS)
    )  # past `end` zeros, so that what no query sees is finite
    key_at = key_ptr + at_S[:, None] * NOPE + n_N[None, :]
    value_at = value_ptr + at_S[:, None] * VALUE + v_V[None, :]
    tl.store(key_at, narrow(key_SN, key_ptr.dtype.element_ty), mask=(n_N < NOPE)[None, :])
    tl.store(value_at, narrow(value_SV, value_ptr.dtype.element_ty), mask=(v_V < VALUE)[None, :])


@jit_varying("num_rows", "start", "num_keys", "page_ptr")
def _attend_prompt(
    q_ptr,
    cache_ptr,
    page_ptr,
    key_ptr,
    value_ptr,
    out_ptr,
    num_rows,
    start,
    num_keys,
    scale_log2,
    page_tokens,
    q_row_stride,
    q_head_stride,
    out_row_stride,
    CACHE_STRIDE: tl.constexpr,
    NOPE: tl.constexpr,
    ROTARY: tl.constexpr,
    VALUE: tl.constexpr,
    LATENT: tl.constexpr,
    TILE_NOPE: tl.constexpr,
    TILE_ROTARY: tl.constexpr,
    TILE_VALUE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    IN_ONE_PAGE: tl.constexpr,
):
    # Rows with most keys first: the last programs to start are then the shortest.
    first_row = (tl.num_programs(0) - 1 - tl.program_id(0)) * TILE_ROWS
    head = tl.program_id(1).to(tl.int64)
    t_T = first_row + tl.arange(0, TILE_ROWS)
    n_N, r_R, v_V = tl.arange(0, TILE_NOPE), tl.arange(0, TILE_ROTARY), tl.arange(0, TILE_VALUE)
    j_J = tl.arange(0, TILE_KEYS)
    end = start + tl.minimum(first_row + TILE_ROWS, num_rows)
    row_T = tl.minimum(t_T, num_rows - 1).to(tl.int64)
    q_at = q_ptr + row_T[:, None] * q_row_stride + head * q_head_stride
    q_TN = tl.load(q_at + n_N[None, :], mask=(n_N < NOPE)[None, :], other=0.0)
    q_TR = tl.load(q_at + NOPE + r_R[None, :], mask=(r_R < ROTARY)[None, :], other=0.0)

    largest_T = tl.full((TILE_ROWS,), float("-inf"), dtype=tl.float32)
    total_T = tl.zeros((TILE_ROWS,), dtype=tl.float32)
    found_TV = tl.zeros((TILE_ROWS, TILE_VALUE), dtype=tl.float32)
    for first_key in range(0, end, TILE_KEYS):
        s_J = first_key + j_J
        at_J = head * num_keys + s_J
        key_JN = tl.load(key_ptr + at_J[:, None] * NOPE + n_N[None, :], mask=(n_N < NOPE)[None, :], other=0.0)
        rotary_at, is_key = rows_of_keys(
            cache_ptr, page_ptr, first_key, end, page_tokens, CACHE_STRIDE, TILE_KEYS, IN_ONE_PAGE
        )
        is_rotary = is_key[:, None] & (r_R < ROTARY)[None, :]
        key_JR = tl.load(rotary_at + LATENT + r_R[None, :], mask=is_rotary, other=0.0)
        value_at = value_ptr + at_J[:, None] * VALUE + v_V[None, :]
        value_JV = tl.load(value_at, mask=(v_V < VALUE)[None, :], other=0.0)
        score_TJ = dot(q_TN, tl.trans(key_JN), tl.zeros((TILE_ROWS, TILE_KEYS), dtype=tl.float32))
        score_TJ = dot(q_TR, tl.trans(key_JR), score_TJ) * scale_log2
        score_TJ = tl.where(s_J[None, :] <= start + t_T[:, None], score_TJ, float("-inf"))
        before_T = largest_T
        largest_T = tl.maximum(before_T, tl.max(score_TJ, axis=1))
        share_TJ = tl.exp2(score_TJ - largest_T[:, None])
        fade_T = tl.exp2(before_T - largest_T)
        total_T = tl.fma(total_T, fade_T, tl.sum(share_TJ, axis=1))
        found_TV = dot(narrow(share_TJ, value_JV.dtype), value_JV, found_TV * fade_T[:, None])
    out_at = out_ptr + t_T.to(tl.int64)[:, None] * out_row_stride + head * VALUE + v_V[None, :]
    out = narrow(tl.div_rn(found_TV, total_T[:, None]), out_ptr.dtype.element_ty)
    tl.store(out_at, out, mask=(t_T < num_rows)[:, None] & (v_V < VALUE)[None, :])


@dataclass(frozen=True, slots=True)
class Tiles:
    """How `launch` cuts the work: by dtype only."""

    rows: int
    keys: int
    keys_decompressed: int
    latent: int
    warps: int
    stages: int


_TILES = {torch.bfloat16: Tiles(128, 64, 128, 64, 8, 2), torch.float32: Tiles(32, 32, 32, 32, 4, 1)}
KEYS_BYTES = (
    512 << 20
)  # of decompressed keys and values at once: more heads are computed one lot after another


def launch(
    q_THD: Tensor,
    cache_CD: Tensor,
    page_P: Tensor,
    page_tokens: int,
    start: int,
    w_uk_HNL: Tensor,
    w_uv_HLV: Tensor,
    scale: float,
) -> Tensor:
    """As `reference`, with weights in q's dtype; shares are rounded to it before they meet the values.

    Tiles of keys start at multiples of their size from position 0 and are added in ascending order, for a row
    of any chunk. A tile of rows may see further keys than a row in it: these add exact zeros.
    """
    num_rows, num_heads, width = q_THD.shape
    (_, nope, latent_width), value_width = w_uk_HNL.shape, w_uv_HLV.shape[2]
    device, dtype, end = q_THD.device, q_THD.dtype, start + num_rows
    rotary = width - nope
    check_tensor("q_THD", q_THD, (None, None, None), FLOATS, device)
    check_tensor("cache_CD", cache_CD, (None, latent_width + rotary), (dtype,), device)
    check_tensor("page_P", page_P, (None,), INT64, device)
    check_tensor("w_uk_HNL", w_uk_HNL, (num_heads, nope, latent_width), (dtype,), device, dense_axes=3)
    check_tensor("w_uv_HLV", w_uv_HLV, (num_heads, latent_width, value_width), (dtype,), device, dense_axes=3)
    require(start >= 0, f"start: {start}")
    require(
        end <= len(page_P) * page_tokens, f"page_P: {len(page_P)} pages of {page_tokens} for {end} tokens"
    )
    out_THV = torch.empty(num_rows, num_heads, value_width, dtype=dtype, device=device)
    if num_rows == 0:
        return out_THV
    tiles = _TILES[dtype]
    num_keys = -(-end // tiles.keys_decompressed) * tiles.keys_decompressed
    head_bytes = num_keys * (nope + value_width) * dtype.itemsize
    heads_at_once = min(num_heads, max(1, KEYS_BYTES // head_bytes))
    key_HSN = torch.empty(heads_at_once, num_keys, nope, dtype=dtype, device=device)
    value_HSV = torch.empty(heads_at_once, num_keys, value_width, dtype=dtype, device=device)
    sizes = {
        "CACHE_STRIDE": cache_CD.stride(0),
        "NOPE": nope,
        "VALUE": value_width,
        "LATENT": latent_width,
        "TILE_NOPE": max(16, next_power_of_2(nope)),
        "TILE_VALUE": max(16, next_power_of_2(value_width)),
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
        **OPTIONS,
    }
    for first in range(0, num_heads, heads_at_once):
        heads = slice(first, first + heads_at_once)
        q, out = q_THD[:, heads], out_THV[:, heads]
        _decompress_keys[num_keys // tiles.keys_decompressed, q.shape[1]](
            cache_CD,
            page_P,
            w_uk_HNL[heads],
            w_uv_HLV[heads],
            key_HSN,
            value_HSV,
            end,
            num_keys,
            page_tokens,
            TILE_LATENT=tiles.latent,
            TILE_KEYS=tiles.keys_decompressed,
            IN_ONE_PAGE=page_tokens % tiles.keys_decompressed == 0,
            **sizes,
        )
        _attend_prompt[-(-num_rows // tiles.rows), q.shape[1]](
            q,
            cache_CD,
            page_P,
            key_HSN,
            value_HSV,
            out,
            num_rows,
            start,
            num_keys,
            scale * LOG2_E,
            page_tokens,
            q.stride(0),
            q.stride(1),
            out.stride(0),
            ROTARY=rotary,
            TILE_ROTARY=max(16, next_power_of_2(rotary)),
            TILE_ROWS=tiles.rows,
            TILE_KEYS=tiles.keys,
            IN_ONE_PAGE=page_tokens % tiles.keys == 0,
            **sizes,
        )
    return out_THV


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
