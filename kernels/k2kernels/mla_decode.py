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
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from k2kernels import arguments
from k2kernels.arguments import FLOATS, HOPPER, INT64, check_tensor, require, shared_bytes
from k2kernels.attend import LOG2_E, TILE_KEYS, attend, num_tiles, read_pages, rows_of_keys
from k2kernels.cost import Cost
from k2kernels.jit import OPTIONS, jit_varying, next_power_of_2
from k2kernels.portable import dot, narrow

if TYPE_CHECKING:
    import triton.language as tl

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


@jit_varying("num_parts", "page_stride", "page_ptr", "length_ptr")
def _attend_part(
    q_ptr,
    cache_ptr,
    page_ptr,
    length_ptr,
    found_ptr,
    largest_ptr,
    total_ptr,
    num_heads,
    num_parts,
    scale_log2,
    page_tokens,
    q_row_stride,
    q_head_stride,
    page_stride,
    CACHE_STRIDE: tl.constexpr,
    LATENT: tl.constexpr,
    ROTARY: tl.constexpr,
    PIECES: tl.constexpr,
    PIECE: tl.constexpr,
    TILE_ROTARY: tl.constexpr,
    TILE_HEADS: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    PART_KEYS: tl.constexpr,
    IN_ONE_PAGE: tl.constexpr,
    KEYS_FIRST: tl.constexpr,
):
    # The first factor of a product has 64 rows at least, on Hopper. `KEYS_FIRST`: keys are these, heads the
    # columns, so 8 heads cost 16 columns. Else heads are the rows, and their sums take whole instructions.
    # On Hopper latents come in pieces, since sums are copied while they are scaled: with all 512 columns at
    # once 488 bytes of a thread's registers are spilled (64 heads), with 64 of them 80.
    row, part = tl.program_id(2).to(tl.int64), tl.program_id(1)
    length = tl.load(length_ptr + row).to(tl.int32)
    first = part * PART_KEYS
    if first >= length:
        return
    h_H = tl.program_id(0) * TILE_HEADS + tl.arange(0, TILE_HEADS)
    is_h = h_H < num_heads
    l_L, r_P = tl.arange(0, PIECE), tl.arange(0, TILE_ROTARY)
    q_at = q_ptr + row * q_row_stride + h_H[:, None] * q_head_stride
    q_HL = ()  # tuples of pieces; what they hold mypy need not know
    found = ()
    for piece in tl.static_range(PIECES):
        at_L = piece * PIECE + l_L
        part_HL = tl.load(q_at + at_L[None, :], mask=is_h[:, None] & (at_L < LATENT)[None, :], other=0.0)
        q_HL += (part_HL,)  # type: ignore[assignment]
        if KEYS_FIRST:
            found += (tl.zeros((PIECE, TILE_HEADS), dtype=tl.float32),)  # type: ignore[assignment]
        else:
            found += (tl.zeros((TILE_HEADS, PIECE), dtype=tl.float32),)  # type: ignore[assignment]
    q_HP = tl.load(q_at + LATENT + r_P[None, :], mask=is_h[:, None] & (r_P < ROTARY)[None, :], other=0.0)

    largest_H = tl.full((TILE_HEADS,), float("-inf"), dtype=tl.float32)
    total_H = tl.zeros((TILE_HEADS,), dtype=tl.float32)
    KEYS_AXIS: tl.constexpr = 0 if KEYS_FIRST else 1
    for first_key in range(first, tl.minimum(first + PART_KEYS, length), TILE_KEYS):
        key_at, is_key = rows_of_keys(
            cache_ptr,
            page_ptr + row * page_stride,
            first_key,
            length,
            page_tokens,
            CACHE_STRIDE,
            TILE_KEYS,
            IN_ONE_PAGE,
        )
        key_JP = tl.load(
            key_at + LATENT + r_P[None, :], mask=is_key[:, None] & (r_P < ROTARY)[None, :], other=0.0
        )
        if KEYS_FIRST:
            score = tl.zeros((TILE_KEYS, TILE_HEADS), dtype=tl.float32)
        else:
            score = tl.zeros((TILE_HEADS, TILE_KEYS), dtype=tl.float32)
        latent_JL = ()
        for piece in tl.static_range(PIECES):
            at_L = piece * PIECE + l_L
            part_JL = tl.load(
                key_at + at_L[None, :], mask=is_key[:, None] & (at_L < LATENT)[None, :], other=0.0
            )
            latent_JL += (part_JL,)  # type: ignore[assignment]
            if KEYS_FIRST:
                score = dot(part_JL, tl.trans(q_HL[piece]), score)
            else:
                score = dot(q_HL[piece], tl.trans(part_JL), score)
        if KEYS_FIRST:
            score = dot(key_JP, tl.trans(q_HP), score)
        else:
            score = dot(q_HP, tl.trans(key_JP), score)
        score = tl.where(tl.expand_dims(is_key, 1 - KEYS_AXIS), score * scale_log2, float("-inf"))
        before_H = largest_H
        largest_H = tl.maximum(before_H, tl.max(score, axis=KEYS_AXIS))
        share = tl.exp2(score - tl.expand_dims(largest_H, KEYS_AXIS))
        fade_H = tl.exp2(before_H - largest_H)
        total_H = tl.fma(total_H, fade_H, tl.sum(share, axis=KEYS_AXIS))
        share = narrow(share, key_JP.dtype)
        faded = found
        found = ()
        for piece in tl.static_range(PIECES):
            before = faded[piece] * tl.expand_dims(fade_H, KEYS_AXIS)
            if KEYS_FIRST:
                found += (dot(tl.trans(latent_JL[piece]), share, before),)  # type: ignore[assignment]
            else:
                found += (dot(share, latent_JL[piece], before),)  # type: ignore[assignment]

    at_H = (row * num_parts + part) * num_heads + h_H
    tl.store(largest_ptr + at_H, largest_H, mask=is_h)
    tl.store(total_ptr + at_H, total_H, mask=is_h)
    found_at = found_ptr + at_H[:, None] * LATENT
    for piece in tl.static_range(PIECES):
        at_L = piece * PIECE + l_L
        found_HL = found[piece]  # type: ignore[var-annotated]
        if KEYS_FIRST:
            found_HL = tl.trans(found_HL)
        tl.store(found_at + at_L[None, :], found_HL, mask=is_h[:, None] & (at_L < LATENT)[None, :])


@jit_varying("num_parts", "length_ptr")
def _merge_parts(
    found_ptr,
    largest_ptr,
    total_ptr,
    length_ptr,
    out_ptr,
    num_heads,
    num_parts,
    LATENT: tl.constexpr,
    TILE_LATENT: tl.constexpr,
    TILE_PARTS: tl.constexpr,
    PART_KEYS: tl.constexpr,
):
    # In ascending order of keys. Parts past a row's length were never written, and are not read.
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    num_own = tl.cdiv(tl.load(length_ptr + row).to(tl.int32), PART_KEYS)
    p_P, l_L = tl.arange(0, TILE_PARTS), tl.arange(0, TILE_LATENT)
    at = row * num_parts * num_heads + head
    largest = tl.max(
        tl.load(largest_ptr + at + p_P * num_heads, mask=p_P < num_own, other=float("-inf")), axis=0
    )
    total = 0.0
    found_L = tl.zeros((TILE_LATENT,), dtype=tl.float32)
    for _ in range(num_own):
        weight = tl.exp2(tl.load(largest_ptr + at) - largest)
        part_L = tl.load(found_ptr + at * LATENT + l_L, mask=l_L < LATENT, other=0.0)
        total = tl.fma(weight, tl.load(total_ptr + at), total)
        found_L = tl.fma(part_L, weight, found_L)
        at += num_heads
    out_at = out_ptr + (row * num_heads + head) * LATENT + l_L
    tl.store(out_at, narrow(tl.div_rn(found_L, total), out_ptr.dtype.element_ty), mask=l_L < LATENT)


@dataclass(frozen=True, slots=True)
class Tiles:
    """How `launch` cuts the work. Not by rows or lengths: it decides the bits."""

    heads: int
    keys: int
    part_keys: int
    keys_first: bool
    warps: int
    stages: int
    piece: int  # columns of the latents that one product takes


# Of shared memory, for 64 queries and two tiles of keys: compiled for sm_89; 216 of sm_90's 227 KB.
_ALL_HEADS_BYTES = 152 << 10


_WHOLE, _PIECE = 512, 64


def choose_tiles(
    num_heads: int, dtype: torch.dtype, shared_bytes: int = 227 << 10, *, is_hopper: bool = True
) -> Tiles:
    """More heads, longer parts: a part's sums are written and read once, 2 KB a head, beside 1,152 a key.

    Where 64 heads have no room (Ada: 99 KB), 16 at a time read the keys four times, from the L2. Pieces are
    for Hopper's wgmma: on Ada they would not be copied to shared memory ahead of their use.
    """
    piece = _PIECE if is_hopper else _WHOLE
    if dtype == torch.float32:
        return Tiles(16, 32, 512, True, 4, 1, piece)
    if num_heads <= 16 or shared_bytes < _ALL_HEADS_BYTES:
        return Tiles(16, 64, 512, True, 4, 2, piece)
    return Tiles(64, 64, 1024, False, 8, 2, piece)


PARTS_BYTES = 256 << 20  # of float32 sums of parts at once: more rows are computed one lot after another


def launch(
    q_RHD: Tensor,
    cache_CD: Tensor,
    page_RP: Tensor,
    page_tokens: int,
    length_R: Tensor,
    latent_width: int,
    scale: float,
) -> Tensor:
    """As `reference`; shares are rounded to q's dtype before they meet the latents.

    Every row's keys are cut in parts of fixed length, which are computed side by side and merged in ascending
    order. How many there may be follows from the width of the tables, so nobody waits for the lengths.
    """
    num_rows, num_heads, width = q_RHD.shape
    device, dtype = q_RHD.device, q_RHD.dtype
    check_tensor("q_RHD", q_RHD, (None, None, None), FLOATS, device)
    check_tensor("cache_CD", cache_CD, (None, width), (dtype,), device)
    check_tensor("page_RP", page_RP, (num_rows, None), INT64, device)
    check_tensor("length_R", length_R, (num_rows,), INT64, device)
    require(0 < latent_width < width, f"latent_width: {latent_width} of {width} columns")
    out_RHL = torch.empty(num_rows, num_heads, latent_width, dtype=dtype, device=device)
    if num_rows == 0:
        return out_RHL
    is_hopper = arguments.capability(device) == HOPPER
    tiles = choose_tiles(num_heads, dtype, shared_bytes(device), is_hopper=is_hopper)
    piece = min(tiles.piece, max(16, next_power_of_2(latent_width)))
    num_parts = -(-page_RP.shape[1] * page_tokens // tiles.part_keys)
    row_bytes = num_parts * num_heads * latent_width * 4
    rows_at_once = min(num_rows, max(1, PARTS_BYTES // row_bytes), 65535)
    part_shape = (rows_at_once, num_parts, num_heads)
    found_RpHL = torch.empty(*part_shape, latent_width, dtype=torch.float32, device=device)
    largest_RpH, total_RpH = torch.empty(2, *part_shape, dtype=torch.float32, device=device)
    for first in range(0, num_rows, rows_at_once):
        q, page, length = (x[first : first + rows_at_once] for x in (q_RHD, page_RP, length_R))
        _attend_part[-(-num_heads // tiles.heads), num_parts, len(q)](
            q,
            cache_CD,
            page,
            length,
            found_RpHL,
            largest_RpH,
            total_RpH,
            num_heads,
            num_parts,
            scale * LOG2_E,
            page_tokens,
            q.stride(0),
            q.stride(1),
            page.stride(0),
            CACHE_STRIDE=cache_CD.stride(0),
            LATENT=latent_width,
            ROTARY=width - latent_width,
            PIECES=-(-latent_width // piece),
            PIECE=piece,
            TILE_ROTARY=max(16, next_power_of_2(width - latent_width)),
            TILE_HEADS=tiles.heads,
            TILE_KEYS=tiles.keys,
            PART_KEYS=tiles.part_keys,
            IN_ONE_PAGE=page_tokens % tiles.keys == 0,
            KEYS_FIRST=tiles.keys_first,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
            **OPTIONS,
        )
        _merge_parts[len(q), num_heads](
            found_RpHL,
            largest_RpH,
            total_RpH,
            length,
            out_RHL[first : first + rows_at_once],
            num_heads,
            num_parts,
            LATENT=latent_width,
            TILE_LATENT=max(16, next_power_of_2(latent_width)),
            TILE_PARTS=next_power_of_2(num_parts),
            PART_KEYS=tiles.part_keys,
            num_warps=4,
            **OPTIONS,
        )
    return out_RHL


@dataclass(frozen=True, slots=True)
class Case:
    R: int
    num_keys: int
    H: int = 8
    L: int = 512
    D: int = 576


CASES = [Case(R=r, num_keys=s, H=h) for r in (0, 1, 64) for s in (1, 4096, 32768, 131072) for h in (8, 64)]


def cost(case: Case) -> Cost:
    moved = 2 * case.R * (case.num_keys * case.D + case.H * (case.D + case.L))
    return Cost(moved, 2 * case.R * case.H * case.num_keys * (case.D + case.L))
