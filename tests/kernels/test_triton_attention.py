"""Triton's latent attention: against the references, and blind to everything that is not a row's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import torch
from k2kernels import mla_decode, mla_prefill
from torch import Tensor

if TYPE_CHECKING:
    from tests.kernels.conftest import RowsStandAlone

N, R, L, V = 16, 8, 32, 24
SCALE = 0.3
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
PAGES = pytest.mark.parametrize("page_tokens", [8, 64], ids=["pages of 8", "pages of 64"])
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
PART_KEYS = mla_decode.choose_tiles(3, torch.bfloat16).part_keys


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


@dataclass
class Paged:
    """One sequence's latents in shuffled pages of a cache that is NaN elsewhere; tables end in nonsense."""

    cache_CD: Tensor
    page_P: Tensor


def paged(num_keys: int, page_tokens: int, dtype: torch.dtype) -> Paged:
    num_pages = -(-num_keys // page_tokens)
    page_P = torch.randperm(num_pages + 3)[:num_pages]
    cache_CD = torch.full(((num_pages + 3) * page_tokens, L + R), torch.nan, dtype=dtype)
    position_S = torch.arange(num_keys)
    cache_CD[page_P[position_S // page_tokens] * page_tokens + position_S % page_tokens] = torch.randn(
        num_keys, L + R
    ).to(dtype)
    return Paged(cache_CD, torch.cat((page_P, torch.tensor([1 << 40, -5]))))


def decode(q_RHD: Tensor, seq: Paged, length_R: Tensor, page_tokens: int) -> Tensor:
    page_RP = seq.page_P.expand(len(q_RHD), -1)
    return mla_decode.launch(q_RHD, seq.cache_CD, page_RP, page_tokens, length_R, L, SCALE)


@DTYPES
@PAGES
@pytest.mark.parametrize("num_heads", [3, 18], ids=["keys first", "heads first"])
def test_decode_equals_its_reference(
    num_heads: int, page_tokens: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Lengths round the ends of a tile and of a part."""
    seq = paged(PART_KEYS + 70, page_tokens, dtype)
    length_R = torch.tensor([1, 63, 64, 65, PART_KEYS, PART_KEYS + 1, PART_KEYS + 70])
    q_RHD = torch.randn(len(length_R), num_heads, L + R).to(dtype)
    wanted = mla_decode.reference(
        q_RHD, seq.cache_CD, seq.page_P[None, :-2].expand(7, -1), page_tokens, length_R, L, SCALE
    )
    found = decode(q_RHD, seq, length_R, page_tokens)
    assert found.dtype == dtype
    assert torch.allclose(found.float(), wanted.float(), atol=TOLERANCE[dtype], rtol=0)


@DTYPES
def test_decode_rows_are_alone(
    dtype: torch.dtype, rows_are_alone: RowsStandAlone, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of several lengths, tables as wide as the longest asks, and two rows at once."""
    seq = paged(PART_KEYS + 9, 8, dtype)
    length_R = torch.tensor([1, PART_KEYS + 9, 64, 65, PART_KEYS, 3])
    q_RHD = torch.randn(6, 3, L + R).to(dtype)

    def op(row_M: Tensor) -> Tensor:
        num_pages = int(-(-length_R[row_M].max() // 8)) if len(row_M) else 0
        page_MP = seq.page_P[:num_pages].expand(len(row_M), -1)
        return mla_decode.launch(q_RHD[row_M], seq.cache_CD, page_MP, 8, length_R[row_M], L, SCALE)

    monkeypatch.setattr(mla_decode, "PARTS_BYTES", 2 * 2 * 3 * L * 4)
    rows_are_alone(op, 6)


def weights(num_heads: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return (torch.randn(num_heads, N, L) / 4).to(dtype), (torch.randn(num_heads, L, V) / 4).to(dtype)


@DTYPES
@PAGES
@pytest.mark.parametrize(("start", "num_rows"), [(0, 1), (0, 65), (100, 37), (63, 131)])
def test_prefill_equals_its_reference(
    start: int, num_rows: int, page_tokens: int, dtype: torch.dtype, device: torch.device
) -> None:
    seq = paged(start + num_rows, page_tokens, dtype)
    q_THD = torch.randn(num_rows, 3, N + R).to(dtype)
    w_uk_HNL, w_uv_HLV = weights(3, dtype)
    given = (q_THD, seq.cache_CD, seq.page_P, page_tokens, start)
    wanted = mla_prefill.reference(*given, w_uk_HNL.float(), w_uv_HLV.float(), SCALE)
    out_THV = mla_prefill.launch(*given, w_uk_HNL, w_uv_HLV, SCALE)
    assert out_THV.dtype == dtype
    assert torch.allclose(out_THV.float(), wanted.float(), atol=TOLERANCE[dtype] * 2, rtol=TOLERANCE[dtype])


@DTYPES
def test_a_prompt_row_does_not_know_its_chunk(
    dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All at once, in chunks, one head at a time; and what later rows wrote does not matter."""
    num_keys = 140
    seq = paged(num_keys, 8, dtype)
    q_THD = torch.randn(num_keys, 2, N + R).to(dtype)
    w_uk_HNL, w_uv_HLV = weights(2, dtype)

    def rows(start: int, stop: int, cache_CD: Tensor) -> Tensor:
        return mla_prefill.launch(
            q_THD[start:stop], cache_CD, seq.page_P, 8, start, w_uk_HNL, w_uv_HLV, SCALE
        )

    whole = rows(0, num_keys, seq.cache_CD)
    parts = [rows(start, min(start + 51, num_keys), seq.cache_CD) for start in range(0, num_keys, 51)]
    assert torch.equal(bits(torch.cat(parts)), bits(whole))
    early_CD = seq.cache_CD.clone()
    for position in range(70, num_keys):
        early_CD[seq.page_P[position // 8] * 8 + position % 8] = torch.nan
    assert torch.equal(bits(rows(69, 70, early_CD)), bits(whole[69:70]))
    monkeypatch.setattr(mla_prefill, "KEYS_BYTES", 1)
    assert torch.equal(bits(rows(0, num_keys, seq.cache_CD)), bits(whole))


def test_no_rows(device: torch.device) -> None:
    seq = paged(8, 8, torch.bfloat16)
    q = torch.empty(0, 3, L + R, dtype=torch.bfloat16)
    assert decode(q, seq, torch.empty(0, dtype=torch.int64), 8).shape == (0, 3, L)
    w_uk_HNL, w_uv_HLV = weights(3, torch.bfloat16)
    out = mla_prefill.launch(q[..., : N + R], seq.cache_CD, seq.page_P, 8, 5, w_uk_HNL, w_uv_HLV, SCALE)
    assert out.shape == (0, 3, V)


def test_a_wrong_argument_is_named() -> None:
    seq, q_RHD = paged(8, 8, torch.bfloat16), torch.randn(1, 3, L + R)
    with pytest.raises(ValueError, match=r"^cache_CD: torch\.bfloat16, expected torch\.float32"):
        decode(q_RHD, seq, torch.tensor([8]), 8)
    with pytest.raises(ValueError, match=r"^length_R: torch\.int32"):
        decode(q_RHD.bfloat16(), seq, torch.tensor([8], dtype=torch.int32), 8)
    w_uk_HNL, w_uv_HLV = weights(3, torch.bfloat16)
    with pytest.raises(ValueError, match=r"^page_P: 1 pages of 8 for 9 tokens"):
        mla_prefill.launch(
            q_RHD[..., : N + R].bfloat16(), seq.cache_CD, seq.page_P[:1], 8, 8, w_uk_HNL, w_uv_HLV, SCALE
        )


def test_tiles_fit_the_machines_shared_memory() -> None:
    """64 heads at once want 152 KB on Ampere and Ada, which have 163 and 99; Hopper's 216 KB fit its 227."""
    many = [
        mla_decode.choose_tiles(64, torch.bfloat16, bytes_) for bytes_ in (99 << 10, 163 << 10, 227 << 10)
    ]
    assert [tiles.heads for tiles in many] == [16, 64, 64]
    assert mla_decode.choose_tiles(8, torch.bfloat16, 99 << 10) == mla_decode.choose_tiles(8, torch.bfloat16)
