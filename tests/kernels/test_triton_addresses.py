"""Addresses past 2^31 elements, as in a cache of 100 GB. Most of that memory is never touched."""

from __future__ import annotations

import numpy
import torch
from k2kernels import QuantisedRows, StoredWeight, act_quant, fp8_gemm, latent_write, mla_decode
from torch import Tensor

PAST = (1 << 31) + (1 << 16)


def far(dtype: torch.dtype) -> Tensor:
    """More than 2^31 elements of whatever was there; on the CPU only reserved."""
    num_bytes = PAST * dtype.itemsize
    if torch.get_default_device().type == "cuda":
        return torch.full((num_bytes,), 255, dtype=torch.uint8).view(dtype)
    return torch.from_numpy(numpy.empty(num_bytes, dtype=numpy.uint8)).view(dtype)


def test_rows_of_a_linear(device: torch.device) -> None:
    rows = act_quant.reference(torch.randn(3, 64), 32)
    w = fp8_gemm.prepare_stored(
        [StoredWeight(torch.randn(20, 64).to(torch.float8_e4m3fn), torch.rand(1, 2), 32)]
    )
    q_TK = far(torch.uint8).view(torch.float8_e4m3fn).as_strided((3, 64), (1 << 30, 1))
    q_TK.view(torch.uint8).copy_(rows.q_TK.view(torch.uint8))
    y_TN = fp8_gemm.launch(QuantisedRows(q_TK, rows.scale_Tk, 32), w, torch.float32)
    assert torch.equal(y_TN, fp8_gemm.launch(rows, w, torch.float32))


def test_the_end_of_a_cache(device: torch.device) -> None:
    """The last page is written, then read; the table's other entry is the first page."""
    page_tokens, width, latent_width = 64, 40, 32
    cache_CD = far(torch.bfloat16)[: PAST // (width * page_tokens) * width * page_tokens].view(-1, width)
    last = len(cache_CD) // page_tokens - 1
    assert (last * page_tokens * width) > 1 << 31
    key_SD, place_S = torch.randn(70, width).bfloat16(), torch.arange(70)
    place_S[:64] += last * page_tokens
    place_S[64:] -= 64
    latent_write.launch_(cache_CD, place_S, key_SD[:, :latent_width], key_SD[:, latent_width:])
    assert torch.equal(cache_CD[place_S], key_SD)
    q_RHD = torch.randn(1, 2, width).bfloat16()
    near = (q_RHD, torch.cat((key_SD, key_SD)), torch.tensor([[0, 1]]))
    given = (page_tokens, torch.tensor([70]), latent_width, 0.3)
    found = mla_decode.launch(q_RHD, cache_CD, torch.tensor([[last, 0]]), *given)
    assert torch.equal(found, mla_decode.launch(*near, *given))
