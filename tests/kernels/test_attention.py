"""Latent attention over the paged cache: both paths against float64, and free of company."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import torch
from k2kernels import latent_write, mla_decode, mla_prefill
from torch import Tensor

if TYPE_CHECKING:
    from tests.kernels.conftest import RowsStandAlone


H, N, R, L, V = 3, 16, 8, 32, 24
PAGE_TOKENS = 8
SCALE = 0.3
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2}


@dataclass
class Paged:
    """One sequence's latents in shuffled pages of a cache that is otherwise NaN."""

    latent_SD: Tensor
    cache_CD: Tensor
    page_P: Tensor


def paged(num_keys: int, dtype: torch.dtype) -> Paged:
    num_pages = -(-num_keys // PAGE_TOKENS)
    page_P = torch.randperm(num_pages + 3)[:num_pages]
    latent_SD = torch.randn(num_keys, L + R).to(dtype)
    cache_CD = torch.full(((num_pages + 3) * PAGE_TOKENS, L + R), torch.nan, dtype=dtype)
    position_S = torch.arange(num_keys)
    place_S = page_P[position_S // PAGE_TOKENS] * PAGE_TOKENS + position_S % PAGE_TOKENS
    latent_write.reference_(cache_CD, place_S, latent_SD[:, :L], latent_SD[:, L:])
    return Paged(latent_SD, cache_CD, page_P)


def test_latent_write_touches_its_places_only() -> None:
    cache_CD = torch.full((10, L + R), torch.nan, dtype=torch.bfloat16)
    latent_TL, key_TR = torch.randn(2, L), torch.randn(2, R)
    latent_write.reference_(cache_CD, torch.tensor([7, 2]), latent_TL, key_TR)
    assert torch.equal(cache_CD[7], torch.cat((latent_TL[0], key_TR[0])).bfloat16())
    assert torch.equal(cache_CD[2], torch.cat((latent_TL[1], key_TR[1])).bfloat16())
    assert cache_CD[[0, 1, 3, 4, 5, 6, 8, 9]].isnan().all()
    latent_write.reference_(cache_CD, torch.empty(0, dtype=torch.int64), latent_TL[:0], key_TR[:0])


@DTYPES
@pytest.mark.parametrize("num_keys", [1, 7, 64, 65, 200])
def test_decode_equals_float64(num_keys: int, dtype: torch.dtype) -> None:
    seq = paged(num_keys, dtype)
    q_RHD = torch.randn(1, H, L + R).to(dtype)
    out_RHL = mla_decode.reference(
        q_RHD, seq.cache_CD, seq.page_P[None], PAGE_TOKENS, torch.tensor([num_keys]), L, SCALE
    )
    keys_SD = seq.latent_SD.double()
    share_HS = (q_RHD[0].double() @ keys_SD.T * SCALE).softmax(-1)
    assert out_RHL.dtype == dtype
    assert torch.allclose(out_RHL[0].double(), share_HS @ keys_SD[:, :L], atol=TOLERANCE[dtype], rtol=0)


@DTYPES
@pytest.mark.parametrize(("start", "num_rows"), [(0, 1), (0, 65), (63, 2), (100, 37), (5, 150)])
def test_prefill_equals_float64_with_a_mask_aligned_bottom_right(
    start: int, num_rows: int, dtype: torch.dtype
) -> None:
    num_keys = start + num_rows
    seq = paged(num_keys, dtype)
    q_THD = torch.randn(num_rows, H, N + R).to(dtype)
    w_uk_HNL, w_uv_HLV = (
        (torch.randn(H, N, L) / 4).to(dtype).float(),
        (torch.randn(H, L, V) / 4).to(dtype).float(),
    )
    out_THV = mla_prefill.reference(
        q_THD, seq.cache_CD, seq.page_P, PAGE_TOKENS, start, w_uk_HNL, w_uv_HLV, SCALE
    )
    latent_SL, rope_SR = seq.latent_SD.double().split((L, R), dim=1)
    key_HSN = torch.einsum("sl,hnl->hsn", latent_SL, w_uk_HNL.double())
    value_HSV = torch.einsum("sl,hlv->hsv", latent_SL, w_uv_HLV.double())
    key_HSD = torch.cat((key_HSN, rope_SR.expand(H, -1, -1)), dim=-1)
    score_HTS = torch.einsum("thd,hsd->hts", q_THD.double(), key_HSD) * SCALE
    seen_TS = torch.arange(num_keys) <= torch.arange(start, num_keys)[:, None]
    exact = torch.einsum("hts,hsv->thv", score_HTS.masked_fill(~seen_TS, -torch.inf).softmax(-1), value_HSV)
    assert out_THV.dtype == dtype
    assert torch.allclose(out_THV.double(), exact, atol=TOLERANCE[dtype] * 2, rtol=TOLERANCE[dtype])


@DTYPES
def test_a_prompt_row_does_not_know_its_chunk(dtype: torch.dtype) -> None:
    """Computed alone, in chunks of any size or all at once; what later rows wrote does not matter."""
    num_keys = 140
    seq = paged(num_keys, dtype)
    q_THD = torch.randn(num_keys, H, N + R).to(dtype)
    w_uk_HNL, w_uv_HLV = torch.randn(H, N, L), torch.randn(H, L, V)

    def rows(start: int, stop: int, cache_CD: Tensor) -> Tensor:
        return mla_prefill.reference(
            q_THD[start:stop], cache_CD, seq.page_P, PAGE_TOKENS, start, w_uk_HNL, w_uv_HLV, SCALE
        )

    whole = rows(0, num_keys, seq.cache_CD)
    for size in (1, 16, 40, 41):
        parts = [rows(start, min(start + size, num_keys), seq.cache_CD) for start in range(0, num_keys, size)]
        assert torch.equal(torch.cat(parts), whole), f"chunks of {size}"
    early_CD = seq.cache_CD.clone()
    for position in range(70, num_keys):
        early_CD[seq.page_P[position // PAGE_TOKENS] * PAGE_TOKENS + position % PAGE_TOKENS] = torch.nan
    assert torch.equal(rows(33, 70, early_CD), whole[33:70])


@DTYPES
def test_decode_rows_stand_alone(
    dtype: torch.dtype, rows_stand_alone: RowsStandAlone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of several lengths, two of one sequence, tables of several lengths filled up with any page."""
    seq = paged(210, dtype)
    length_R = torch.tensor([1, 210, 64, 65, 209, 3, 128, 129, 17, 90])
    q_RHD = torch.randn(10, H, L + R).to(dtype)

    def op(row_M: Tensor) -> Tensor:
        length_M = length_R[row_M]
        num_pages = int(-(-length_M.max() // PAGE_TOKENS)) if len(row_M) else 0
        page_MP = seq.page_P[:num_pages].expand(len(row_M), -1).clone()
        page_MP[torch.arange(num_pages) * PAGE_TOKENS >= length_M[:, None]] = 0
        return mla_decode.reference(q_RHD[row_M], seq.cache_CD, page_MP, PAGE_TOKENS, length_M, L, SCALE)

    rows_stand_alone(op, 10)
    whole = op(torch.arange(10))
    monkeypatch.setattr(mla_decode, "MAX_TILES", 9)  # two or three rows at once
    assert torch.equal(op(torch.arange(10)), whole)


def test_no_rows() -> None:
    seq = paged(5, torch.float32)
    none = torch.empty(0, dtype=torch.int64)
    assert mla_decode.reference(
        torch.empty(0, H, L + R), seq.cache_CD, none.view(0, 0), PAGE_TOKENS, none, L, SCALE
    ).shape == (0, H, L)
    assert mla_prefill.reference(
        torch.empty(0, H, N + R),
        seq.cache_CD,
        seq.page_P,
        PAGE_TOKENS,
        5,
        torch.randn(H, N, L),
        torch.randn(H, L, V),
        SCALE,
    ).shape == (0, H, V)


@pytest.mark.parametrize("num_threads", [2, 3])
def test_a_short_sequence_has_company_or_not_on_any_number_of_threads(
    num_threads: int, with_threads: Callable[[int], None]
) -> None:
    """At K2's widths: one key tile alone was one product, which MKL shared among threads along its sum."""
    with_threads(num_threads)
    heads, latent, rope, unrotated = 8, 512, 64, 128
    cache_CD, q_RHD = torch.randn(5 * 64, latent + rope), torch.randn(5, heads, latent + rope)
    page_R1, length_R = torch.arange(5)[:, None], torch.tensor([64, 1, 33, 64, 2])

    def decode(rows: slice) -> Tensor:
        return mla_decode.reference(q_RHD[rows], cache_CD, page_R1[rows], 64, length_R[rows], latent, SCALE)

    together = decode(slice(0, 5))
    assert torch.equal(torch.cat([decode(slice(i, i + 1)) for i in range(5)]), together)

    w_uk_HNL, w_uv_HLV = torch.randn(1, unrotated, latent) / 20, torch.randn(1, latent, unrotated) / 20
    q_THD = torch.randn(70, 1, unrotated + rope)

    def prefill(start: int, stop: int) -> Tensor:
        return mla_prefill.reference(
            q_THD[start:stop], cache_CD, torch.arange(2), 64, start, w_uk_HNL, w_uv_HLV, SCALE
        )

    whole = prefill(0, 70)
    for cuts in ([1], [40], [63, 64, 65]):
        spans = zip([0, *cuts], [*cuts, 70], strict=True)
        assert torch.equal(torch.cat([prefill(a, b) for a, b in spans]), whole), cuts
