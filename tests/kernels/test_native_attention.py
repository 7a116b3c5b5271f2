"""The native attention, every ISA, against float64 and free of company."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from k2kernels import KernelSet, StoredWeight, absorb
from k2kernels.native import ISAS, NoNativeKernelsError, load
from torch import Tensor

if TYPE_CHECKING:
    from tests.kernels.conftest import RowsStandAlone

try:
    HERE = tuple(load().isas)
except NoNativeKernelsError as error:
    pytest.skip(str(error), allow_module_level=True)

REFERENCE = KernelSet.reference()
PAGE_TOKENS = 8
SCALE = 0.13
# heads, unrotated, rotary, latent and value width: K2's of a tp rank, and awkward ones
WIDTHS = [(3, 16, 8, 32, 24), (16, 128, 64, 512, 128), (20, 40, 6, 50, 33)]
DTYPE = torch.bfloat16
BF16 = 2.0**-8
BLOCK = 32


@pytest.fixture(params=ISAS)
def native(request: pytest.FixtureRequest) -> KernelSet:
    if request.param not in HERE:
        pytest.skip(f"this processor has no {request.param}")
    return KernelSet.native(request.param, num_threads=2)


def same_bits(a: Tensor, b: Tensor) -> bool:
    a, b = a.contiguous(), b.contiguous()
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def paged(num_keys: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Latents [S, D], a cache that holds them in shuffled pages and is otherwise NaN, and the page table."""
    num_pages = -(-num_keys // PAGE_TOKENS)
    page_P = torch.randperm(num_pages + 3)[:num_pages]
    latent_SD = torch.randn(num_keys, width).bfloat16()
    cache_CD = torch.full(((num_pages + 3) * PAGE_TOKENS, width), torch.nan, dtype=DTYPE)
    position_S = torch.arange(num_keys)
    cache_CD[page_P[position_S // PAGE_TOKENS] * PAGE_TOKENS + position_S % PAGE_TOKENS] = latent_SD
    return latent_SD, cache_CD, page_P


def kv_b(
    heads: int, nope: int, latent: int, value: int, *, is_fp8: bool
) -> tuple[list[StoredWeight], list[StoredWeight]]:
    """Each head's key and value rows, sized to keep products near one; in small scale blocks, or bfloat16."""

    def rows(num_rows: int) -> StoredWeight:
        w_NK = torch.randn(num_rows, latent) / latent**0.5
        if not is_fp8:
            return StoredWeight(w_NK.bfloat16())
        scale_nk = torch.rand(-(-num_rows // BLOCK), -(-latent // BLOCK)) / 100
        return StoredWeight((w_NK * 300).to(torch.float8_e4m3fn), scale_nk, BLOCK)

    return [rows(nope) for _ in range(heads)], [rows(value) for _ in range(heads)]


def test_latent_write_touches_its_places_only(native: KernelSet) -> None:
    cache_CD = torch.full((10, 40), torch.nan, dtype=DTYPE)
    both_TD = torch.randn(2, 50).bfloat16()
    native.latent_write_(cache_CD, torch.tensor([7, 2]), both_TD[:, :32], both_TD[:, 34:42])
    assert torch.equal(cache_CD[[7, 2]], torch.cat((both_TD[:, :32], both_TD[:, 34:42]), dim=1))
    assert cache_CD[[0, 1, 3, 4, 5, 6, 8, 9]].isnan().all()


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("num_keys", [1, 7, 64, 65, 257, 700])
def test_decode_equals_float64(native: KernelSet, widths: tuple[int, ...], num_keys: int) -> None:
    heads, _, rotary, latent, _ = widths
    keys_SD, cache_CD, page_P = paged(num_keys, latent + rotary)
    q_RHD = torch.randn(1, heads, latent + rotary).bfloat16()
    length_R = torch.tensor([num_keys])
    out_RHL = native.mla_decode(q_RHD, cache_CD, page_P[None], PAGE_TOKENS, length_R, latent, SCALE)
    share_HS = (q_RHD[0].double() @ keys_SD.double().T * SCALE).softmax(-1)
    exact_HL = share_HS @ keys_SD[:, :latent].double()
    magnitude_HL = share_HS @ keys_SD[:, :latent].double().abs()
    # One rounding of the result, and shares good to 2^-16 (AMX: two bfloat16 numbers).
    assert ((out_RHL[0].double() - exact_HL).abs() <= BF16 * exact_HL.abs() + 1e-4 * magnitude_HL).all()


def test_decode_rows_stand_alone(native: KernelSet, rows_stand_alone: RowsStandAlone) -> None:
    """Rows of several lengths, two of one sequence, tables of several lengths that end in pages of NaN."""
    heads, _, rotary, latent, _ = WIDTHS[2]
    _, cache_CD, page_P = paged(600, latent + rotary)
    length_R = torch.tensor([1, 600, 64, 65, 257, 3, 128, 512, 17, 90])
    q_RHD = torch.randn(10, heads, latent + rotary).bfloat16()

    def op(row_M: Tensor) -> Tensor:
        length_M = length_R[row_M]
        num_pages = int(-(-length_M.max() // PAGE_TOKENS)) if len(row_M) else 0
        page_MP = page_P[:num_pages].expand(len(row_M), -1).clone()
        page_MP[torch.arange(num_pages) * PAGE_TOKENS >= length_M[:, None]] = 2**40  # not to be followed
        return native.mla_decode(q_RHD[row_M], cache_CD, page_MP, PAGE_TOKENS, length_M, latent, SCALE)

    rows_stand_alone(op, 10)


@pytest.mark.parametrize("is_fp8", [True, False])
@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize(("start", "num_rows"), [(0, 1), (0, 65), (63, 2), (100, 37), (5, 150)])
def test_prefill_equals_float64(
    native: KernelSet, widths: tuple[int, ...], start: int, num_rows: int, *, is_fp8: bool
) -> None:
    heads, nope, rotary, latent, value = widths
    num_keys = start + num_rows
    latent_SD, cache_CD, page_P = paged(num_keys, latent + rotary)
    q_THD = torch.randn(num_rows, heads, nope + rotary).bfloat16()
    key_heads, value_heads = kv_b(heads, nope, latent, value, is_fp8=is_fp8)
    w_uk_HNL, w_uv_HLV = absorb.prepare_keys(key_heads), absorb.prepare_values(value_heads)
    keys, values = native.prepare_keys(key_heads), native.prepare_values(value_heads)
    out_THV = native.mla_prefill(q_THD, cache_CD, page_P, PAGE_TOKENS, start, keys, values, SCALE)
    latent_SL, rope_SR = latent_SD.double().split((latent, rotary), dim=1)
    key_HSN = torch.einsum("sl,hnl->hsn", latent_SL, w_uk_HNL.double()).bfloat16().double()
    value_HSV = torch.einsum("sl,hlv->hsv", latent_SL, w_uv_HLV.double()).bfloat16().double()
    key_HSD = torch.cat((key_HSN, rope_SR.expand(heads, -1, -1)), dim=-1)
    score_HTS = torch.einsum("thd,hsd->hts", q_THD.double(), key_HSD) * SCALE
    seen_TS = torch.arange(num_keys) <= torch.arange(start, num_keys)[:, None]
    share_HTS = score_HTS.masked_fill(~seen_TS, -torch.inf).softmax(-1)
    exact = torch.einsum("hts,hsv->thv", share_HTS, value_HSV)
    magnitude = torch.einsum("hts,hsv->thv", share_HTS, value_HSV.abs())
    # A key or value whose float32 sum lies near a midpoint is rounded to its other bfloat16 neighbour.
    assert ((out_THV.double() - exact).abs() <= BF16 * exact.abs() + BF16 * magnitude).all()


def test_a_prompt_row_does_not_know_its_chunk(native: KernelSet) -> None:
    """Computed alone, in chunks of any size or all at once; what later rows wrote does not matter."""
    heads, nope, rotary, latent, value = WIDTHS[2]
    num_keys = 140
    _, cache_CD, page_P = paged(num_keys, latent + rotary)
    q_THD = torch.randn(num_keys, heads, nope + rotary).bfloat16()
    key_heads, value_heads = kv_b(heads, nope, latent, value, is_fp8=True)
    keys, values = native.prepare_keys(key_heads), native.prepare_values(value_heads)

    def rows(start: int, stop: int, cache_CD: Tensor) -> Tensor:
        return native.mla_prefill(
            q_THD[start:stop], cache_CD, page_P, PAGE_TOKENS, start, keys, values, SCALE
        )

    whole = rows(0, num_keys, cache_CD)
    for size in (1, 16, 40, 41):
        parts = [rows(start, min(start + size, num_keys), cache_CD) for start in range(0, num_keys, size)]
        assert same_bits(torch.cat(parts), whole), f"chunks of {size}"
    early_CD = cache_CD.clone()
    for position in range(70, num_keys):
        early_CD[page_P[position // PAGE_TOKENS] * PAGE_TOKENS + position % PAGE_TOKENS] = torch.nan
    assert same_bits(rows(33, 70, early_CD), whole[33:70])


def test_a_bad_query_is_bad_alone(native: KernelSet) -> None:
    heads, _, rotary, latent, _ = WIDTHS[0]
    _, cache_CD, page_P = paged(300, latent + rotary)
    q_RHD = torch.randn(3, heads, latent + rotary).bfloat16()
    page_RP, length_R = page_P.expand(3, -1), torch.tensor([300, 300, 40])
    clean = native.mla_decode(q_RHD, cache_CD, page_RP, PAGE_TOKENS, length_R, latent, SCALE)
    q_RHD[1, 2, 5] = torch.nan
    found = native.mla_decode(q_RHD, cache_CD, page_RP, PAGE_TOKENS, length_R, latent, SCALE)
    assert found[1, 2].isnan().all()
    assert same_bits(found[[0, 2]], clean[[0, 2]])
    assert same_bits(found[1, :2], clean[1, :2])


def test_no_rows(native: KernelSet) -> None:
    heads, nope, rotary, latent, value = WIDTHS[0]
    _, cache_CD, page_P = paged(5, latent + rotary)
    none = torch.empty(0, dtype=torch.int64)
    q_RHD = torch.empty(0, heads, latent + rotary).bfloat16()
    found = native.mla_decode(q_RHD, cache_CD, none.view(0, 0), PAGE_TOKENS, none, latent, SCALE)
    assert found.shape == (0, heads, latent)
    key_heads, value_heads = kv_b(heads, nope, latent, value, is_fp8=True)
    keys, values = native.prepare_keys(key_heads), native.prepare_values(value_heads)
    q_THD = torch.empty(0, heads, nope + rotary).bfloat16()
    found = native.mla_prefill(q_THD, cache_CD, page_P, PAGE_TOKENS, 5, keys, values, SCALE)
    assert found.shape == (0, heads, value)


def test_places_past_two_billion_elements(native: KernelSet) -> None:
    """A cache of 2^31 + 2^20 elements, of which only the pages at its end are ever touched."""
    width, latent = 40, 32
    num_places = (2**31 + 2**20) // width // PAGE_TOKENS * PAGE_TOKENS
    cache_CD = torch.empty(num_places, width, dtype=DTYPE)  # reserved, not touched: costs no memory
    last = num_places // PAGE_TOKENS - 1
    page_P = torch.tensor([last, last - 1])
    latent_SD = torch.randn(12, width).bfloat16()
    place_S = torch.cat((last * PAGE_TOKENS + torch.arange(8), (last - 1) * PAGE_TOKENS + torch.arange(4)))
    native.latent_write_(cache_CD, place_S, latent_SD[:, :latent], latent_SD[:, latent:])
    q_RHD = torch.randn(1, 3, width).bfloat16()
    near_CD = torch.cat((latent_SD[:8], latent_SD[8:], torch.full((4, width), torch.nan).bfloat16()))
    near_RP, length_R = torch.tensor([[0, 1]]), torch.tensor([12])
    near = native.mla_decode(q_RHD, near_CD, near_RP, PAGE_TOKENS, length_R, latent, SCALE)
    far = native.mla_decode(q_RHD, cache_CD, page_P[None], PAGE_TOKENS, length_R, latent, SCALE)
    assert same_bits(far, near)
