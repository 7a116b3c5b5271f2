"""Unquantised products: the head, the router's logits, the absorbed parts of kv_b."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from k2kernels import StoredWeight, absorb, fp8_gemm, linear_bf16, router_logits

if TYPE_CHECKING:
    from tests.kernels.conftest import RowsStandAlone


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("num_tokens", [0, 1, 37])
def test_the_head_equals_float64(num_tokens: int, dtype: torch.dtype) -> None:
    x_TK, w_NK = torch.randn(num_tokens, 96).to(dtype), torch.randn(51, 96).to(dtype)
    y_TN = linear_bf16.reference(x_TK, linear_bf16.prepare(w_NK), torch.float32)
    assert y_TN.dtype == torch.float32
    assert torch.allclose(y_TN.double(), x_TK.double() @ w_NK.double().T, atol=2e-5)


@pytest.mark.parametrize("num_tokens", [0, 1, 37])
def test_router_logits_equal_float64(num_tokens: int) -> None:
    x_TD, w_ED = torch.randn(num_tokens, 96).bfloat16(), torch.randn(12, 96)
    assert torch.allclose(
        router_logits.reference(x_TD, w_ED).double(), x_TD.double() @ w_ED.double().T, atol=2e-5
    )


def test_a_router_in_half_precision_is_refused() -> None:
    with pytest.raises(AssertionError, match=r"float32, not torch\.bfloat16"):
        router_logits.reference(torch.randn(1, 8), torch.randn(3, 8).bfloat16())


@pytest.mark.parametrize("num_tokens", [0, 1, 37])
def test_absorb_multiplies_per_head(num_tokens: int) -> None:
    x_THK, w_HKN = torch.randn(num_tokens, 3, 16).bfloat16(), torch.randn(3, 16, 40).bfloat16()
    y_THN = absorb.reference(x_THK, linear_bf16.prepare(w_HKN))
    assert y_THN.dtype == torch.bfloat16
    exact_THN = torch.einsum("thk,hkn->thn", x_THK.double(), w_HKN.double())
    assert torch.allclose(y_THN.double(), exact_THN, rtol=2**-7, atol=1e-5)


def test_rows_stand_alone(rows_stand_alone: RowsStandAlone) -> None:
    x_TD, w_ED = torch.randn(50, 100), torch.randn(12, 100)
    rows_stand_alone(lambda row_M: router_logits.reference(x_TD[row_M], w_ED), 50)
    rows_stand_alone(lambda row_M: linear_bf16.reference(x_TD[row_M], w_ED, torch.float32), 50)
    x_THK, w_HKN = torch.randn(50, 3, 16), torch.randn(3, 40, 16).transpose(1, 2)
    rows_stand_alone(lambda row_M: absorb.reference(x_THK[row_M], w_HKN), 50)


@pytest.mark.parametrize("block", [None, 16, 24])
def test_heads_of_kv_b_are_its_rows(block: int | None) -> None:
    """Three heads of 16 key and 32 value rows; blocks of 24 rows hold rows of both kinds."""
    w_NK = torch.randn(3 * 48, 40)
    kv_b = StoredWeight(w_NK.bfloat16())
    if block is not None:
        scale_nk = torch.rand(-(-len(w_NK) // block), -(-40 // block)) + 0.1
        kv_b = StoredWeight((w_NK * 100).to(torch.float8_e4m3fn), scale_nk, block)
    keys, values = absorb.heads_of(kv_b, 3, 16)
    assert [head.block for head in (*keys, *values)] == [None if block == 24 else block] * 6
    w_HRK = fp8_gemm.dequantise(kv_b).view(3, 48, 40)
    assert torch.equal(absorb.prepare_keys(keys), w_HRK[:, :16])
    assert torch.equal(absorb.prepare_values(values), w_HRK[:, 16:].transpose(1, 2))
