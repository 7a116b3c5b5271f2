"""Dynamic float8 quantisation of activations."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from k2kernels import act_quant

if TYPE_CHECKING:
    from tests.kernels.conftest import RowsStandAlone


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [1, 100, 128, 300, 1536])
def test_values_are_the_nearest_on_the_scaled_grid(width: int, dtype: torch.dtype) -> None:
    x_TK = (torch.randn(7, width) * torch.tensor([1e-3, 1, 1e4, 1, 3, 1e-6, 30])[:, None]).to(dtype)
    rows = act_quant.reference(x_TK, 128)
    assert rows.q_TK.dtype == torch.float8_e4m3fn
    assert rows.scale_Tk.shape == (7, -(-width // 128))
    for group, part in enumerate(x_TK.double().split(128, dim=1)):
        scale_T1 = (part.abs().amax(1).clamp_min(1e-4) / 448)[:, None]
        assert torch.allclose(rows.scale_Tk[:, group].double(), scale_T1[:, 0], rtol=1e-6)
        grid = rows.q_TK[:, group * 128 : (group + 1) * 128].double()
        # e4m3 has 3 bits behind the point; below 2^-6 the grid is even.
        step = 2.0 ** (grid.abs().clamp_min(2.0**-6).log2().floor() - 3)
        assert ((part / scale_T1 - grid).abs() <= 0.5001 * step).all()


def test_the_largest_becomes_448_and_zeros_stay_zero() -> None:
    x_TK = torch.zeros(2, 256)
    x_TK[0, 5], x_TK[0, 200] = -3.0, 1e-9
    rows = act_quant.reference(x_TK, 128)
    assert rows.q_TK[0, 5].float() == -448.0
    assert rows.scale_Tk[0].tolist() == pytest.approx([3 / 448, 1e-4 / 448])
    assert not rows.q_TK[1].float().any()
    assert torch.isfinite(rows.float()).all()


def test_nan_stays_in_its_group() -> None:
    x_TK = torch.randn(3, 256)
    x_TK[1, 140] = torch.nan
    values = act_quant.reference(x_TK, 128).float()
    assert values[1, 128:].isnan().all()
    assert torch.isfinite(values[1, :128]).all()
    assert torch.isfinite(values[[0, 2]]).all()


def test_rows_stand_alone(rows_stand_alone: RowsStandAlone) -> None:
    x_TK = torch.randn(40, 200)
    rows_stand_alone(lambda row_M: act_quant.reference(x_TK[row_M], 64).float(), 40)


def test_picked_rows_are_the_rows() -> None:
    rows = act_quant.reference(torch.randn(6, 200), 128)
    row_M = torch.tensor([5, 0, 0, 3])
    assert torch.equal(rows[row_M].float(), rows.float()[row_M])
