"""Block-FP8 linears against float64 on the values that the float8 numbers stand for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from k2kernels import StoredWeight, act_quant, fp8_gemm
from torch import Tensor

if TYPE_CHECKING:
    from tests.kernels.conftest import RowsStandAlone


def stored(rows: int, cols: int, block: int = 128) -> StoredWeight:
    w_NK = (torch.randn(rows, cols) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
    return StoredWeight(w_NK, torch.rand(-(-rows // block), -(-cols // block)) + 0.1, block)


def values(weight: StoredWeight) -> Tensor:
    """Float64, entry by entry."""
    assert weight.scale_nk is not None
    assert weight.block is not None
    row_N, col_K = (torch.arange(size) // weight.block for size in weight.w_NK.shape)
    return weight.w_NK.double() * weight.scale_nk.double()[row_N][:, col_K]


SHAPES = [(128, 128), (192, 256), (576, 512), (64, 300), (1, 1)]  # rows ragged as kv_a, columns too


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_dequantised_weights_are_value_times_scale(rows: int, cols: int) -> None:
    weight = stored(rows, cols)
    assert torch.allclose(fp8_gemm.dequantise(weight).double(), values(weight), rtol=1e-7)


def test_scales_that_do_not_fit_are_refused() -> None:
    weight = stored(192, 256)
    assert weight.scale_nk is not None
    with pytest.raises(AssertionError, match=r"scales \[1, 2\] for a weight \[192, 256\] in blocks of 128"):
        fp8_gemm.dequantise(StoredWeight(weight.w_NK, weight.scale_nk[:1], 128))


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
@pytest.mark.parametrize("num_tokens", [0, 1, 16, 33])
def test_w8a8_equals_float64_on_the_quantised_values(rows: int, cols: int, num_tokens: int) -> None:
    weight = stored(rows, cols)
    x = act_quant.reference(torch.randn(num_tokens, cols).bfloat16(), 128)
    y_TN = fp8_gemm.reference(x, fp8_gemm.prepare([weight]), torch.float32)
    column_K = torch.arange(cols) // 128
    x_TK = x.q_TK.double() * x.scale_Tk.double()[:, column_K]
    exact_TN = x_TK @ values(weight).T
    assert y_TN.shape == (num_tokens, rows)
    magnitude_TN = x_TK.abs() @ values(weight).abs().T
    assert ((y_TN - exact_TN).abs() <= 1e-6 * magnitude_TN).all()
    rounded_TN = fp8_gemm.reference(x, fp8_gemm.prepare([weight]), torch.bfloat16)
    assert torch.equal(rounded_TN, y_TN.bfloat16())


def test_float_activations_are_not_quantised() -> None:
    weight, x_TK = stored(192, 256), torch.randn(5, 256)
    y_TN = fp8_gemm.reference(x_TK, fp8_gemm.prepare([weight]), torch.float32)
    assert torch.allclose(y_TN.double(), x_TK.double() @ values(weight).T, rtol=1e-4, atol=1e-2)


def test_parts_follow_one_another() -> None:
    first, second, x_TK = stored(192, 256), stored(64, 256), torch.randn(5, 256)
    both = fp8_gemm.reference(x_TK, fp8_gemm.prepare([first, second]), torch.float32)
    alone = [fp8_gemm.reference(x_TK, fp8_gemm.prepare([part]), torch.float32) for part in (first, second)]
    assert torch.allclose(both, torch.cat(alone, dim=1), rtol=1e-5, atol=1e-3)


def test_rows_stand_alone(rows_stand_alone: RowsStandAlone) -> None:
    linear, x_TK = fp8_gemm.prepare([stored(192, 256)]), torch.randn(50, 256).bfloat16()

    def op(row_M: Tensor) -> Tensor:
        return fp8_gemm.reference(act_quant.reference(x_TK[row_M], 128), linear, torch.bfloat16)

    rows_stand_alone(op, 50)
