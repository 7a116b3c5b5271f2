"""Norms, rotations, activations, sums over experts, and what goes over the wire."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from k2kernels import act_quant, rmsnorm, rope, swiglu, weighted_sum, wire

if TYPE_CHECKING:
    from tests.kernels.conftest import RowsStandAlone


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def rounding(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


@DTYPES
@pytest.mark.parametrize(("num_tokens", "width"), [(0, 8), (1, 1), (5, 33), (40, 512)])
def test_rmsnorm_equals_float64(num_tokens: int, width: int, dtype: torch.dtype) -> None:
    x_TD, weight_D = (torch.randn(num_tokens, width) * 7).to(dtype), torch.randn(width).to(dtype)
    exact = x_TD.double() / (x_TD.double().square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight_D.double()
    assert torch.allclose(
        rmsnorm.reference(x_TD, weight_D, 1e-3).double(), exact, rtol=2 * rounding(dtype), atol=1e-30
    )


def test_rmsnorm_of_zeros_is_zero() -> None:
    assert not rmsnorm.reference(torch.zeros(2, 8), torch.ones(8), 1e-6).any()


@DTYPES
def test_rope_turns_neighbouring_pairs(dtype: torch.dtype) -> None:
    x_THR, angle_TF = torch.randn(9, 3, 8).to(dtype), torch.rand(9, 4) * 6
    turned = rope.reference(x_THR, angle_TF.cos(), angle_TF.sin()).double()
    as_complex = torch.view_as_complex(x_THR.double().view(9, 3, 4, 2).contiguous())
    exact = torch.view_as_real(as_complex * torch.exp(1j * angle_TF.double())[:, None]).flatten(-2)
    assert torch.allclose(turned, exact, rtol=rounding(dtype), atol=1e-6)


@DTYPES
def test_swiglu_gates_with_the_first_half(dtype: torch.dtype) -> None:
    h_TG = (torch.randn(11, 66) * 5).to(dtype)
    gate_TF, up_TF = h_TG.double().chunk(2, dim=-1)
    exact = gate_TF * gate_TF.sigmoid() * up_TF
    tolerance = max(rounding(dtype), 1e-6)
    assert torch.allclose(swiglu.reference(h_TG).double(), exact, rtol=tolerance, atol=1e-30)


def test_weighted_sum_adds_experts_in_order_then_the_shared_one() -> None:
    out_TKD = torch.tensor([[[1e8], [1.0], [-1e8]]])
    weight_TK, shared_TD = torch.ones(1, 3), torch.tensor([[0.5]])
    # ((1e8 + 1) - 1e8) + 0.5 in float32: the 1 is lost in the first sum.
    assert weighted_sum.reference(out_TKD, weight_TK, shared_TD, torch.float32).tolist() == [[0.5]]
    halves = weighted_sum.reference(out_TKD, weight_TK / 2, shared_TD, torch.bfloat16)
    assert halves.dtype == torch.bfloat16
    assert halves.tolist() == [[0.5]]


@DTYPES
def test_weighted_sum_equals_float64(dtype: torch.dtype) -> None:
    out_TKD, weight_TK, shared_TD = torch.randn(7, 8, 20).to(dtype), torch.rand(7, 8), torch.randn(7, 20)
    exact = (out_TKD.double() * weight_TK.double()[..., None]).sum(1) + shared_TD.double()
    y_TD = weighted_sum.reference(out_TKD, weight_TK, shared_TD, dtype)
    assert torch.allclose(y_TD.double(), exact, rtol=rounding(dtype), atol=1e-5)
    none = weighted_sum.reference(out_TKD[:0], weight_TK[:0], shared_TD[:0], dtype)
    assert none.shape == (0, 20)


@pytest.mark.parametrize("num_tokens", [0, 1, 9])
@pytest.mark.parametrize("width", [128, 300, 7])
def test_the_wire_brings_what_was_quantised(num_tokens: int, width: int) -> None:
    x_TD = torch.randn(num_tokens, width).bfloat16()
    packed_TW = wire.pack(x_TD, 128)
    assert packed_TW.dtype == torch.uint8
    assert packed_TW.shape == (num_tokens, width + 4 * -(-width // 128))
    rows = wire.unpack(packed_TW, width, 128)
    assert isinstance(rows, act_quant.QuantisedRows)
    assert torch.equal(rows.float(), act_quant.reference(x_TD, 128).float())
    assert torch.equal(wire.unpack(wire.pack(x_TD, None), width, None).float(), x_TD.float())


def test_a_wire_row_of_another_width_is_refused() -> None:
    with pytest.raises(AssertionError, match="264 bytes in a row, expected 132"):
        wire.unpack(wire.pack(torch.randn(2, 256), 128), 128, 128)


@DTYPES
def test_rows_stand_alone(dtype: torch.dtype, rows_stand_alone: RowsStandAlone) -> None:
    """Odd widths: rows begin anywhere in a vector, and the last ones are its tail."""
    x_TD, weight_D = torch.randn(50, 37).to(dtype), torch.randn(37).to(dtype)
    rows_stand_alone(lambda row_M: rmsnorm.reference(x_TD[row_M], weight_D, 1e-6), 50)
    h_TG = torch.randn(50, 38).to(dtype)
    rows_stand_alone(lambda row_M: swiglu.reference(h_TG[row_M]), 50)
    x_THR, angle_TF = torch.randn(50, 3, 6).to(dtype), torch.rand(50, 3)
    cos_TF, sin_TF = angle_TF.cos(), angle_TF.sin()
    rows_stand_alone(lambda row_M: rope.reference(x_THR[row_M], cos_TF[row_M], sin_TF[row_M]), 50)
    out_TKD, weight_TK, shared_TD = torch.randn(50, 3, 7).to(dtype), torch.rand(50, 3), torch.randn(50, 7)
    rows_stand_alone(
        lambda row_M: weighted_sum.reference(out_TKD[row_M], weight_TK[row_M], shared_TD[row_M], dtype), 50
    )
