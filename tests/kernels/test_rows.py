"""Row-invariant building blocks: their accuracy, and the properties that they are for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from k2kernels.rows import exp_of_negative, sigmoid, tiled_matmul, tree_sum

if TYPE_CHECKING:
    from tests.kernels.conftest import RowsStandAlone


def test_exp_is_within_two_units_in_the_last_place() -> None:
    x = torch.cat((-torch.linspace(0, 87, 200_001), -torch.rand(10_000) * 1e-3, torch.zeros(1)))
    exact = x.double().exp()
    unit = torch.finfo(torch.float32).eps * 2.0 ** exact.log2().floor()
    assert ((exp_of_negative(x).double() - exact).abs() / unit).max() < 2
    assert exp_of_negative(torch.tensor([0.0])).item() == 1.0


def test_exp_of_what_is_masked_is_exactly_zero() -> None:
    assert exp_of_negative(torch.tensor([-torch.inf, -1e30, -88.0])).tolist() == [0.0, 0.0, 0.0]
    assert exp_of_negative(torch.tensor([torch.nan])).isnan().all()


def test_sigmoid_is_accurate_on_both_sides() -> None:
    x = torch.linspace(-80, 80, 100_001)
    exact = x.double().sigmoid()
    assert ((sigmoid(x).double() - exact).abs() / exact).max() < 5e-7
    assert sigmoid(torch.tensor([-torch.inf, torch.inf])).tolist() == [0.0, 1.0]


def test_elementwise_functions_have_no_tail() -> None:
    """torch's own float32 sigmoid differs between the body and the tail of a tensor; these may not."""
    x = -torch.rand(1000) * 20
    for function in (exp_of_negative, sigmoid):
        whole = function(x)
        for size in (1, 5, 7, 33):
            parts = torch.cat([function(part) for part in x.split(size)])
            assert torch.equal(parts, whole)


@pytest.mark.parametrize("width", [0, 1, 2, 3, 7, 64, 1000])
def test_tree_sum_is_the_sum_and_zeros_at_the_end_change_no_bit(width: int) -> None:
    x = torch.randn(5, width)
    total = tree_sum(x, 1)
    assert torch.allclose(total.double(), x.double().sum(1), atol=1e-5)
    for extra in (1, 2, 61, 1000):
        padded = torch.cat((x, torch.zeros(5, extra)), dim=1)
        assert torch.equal(tree_sum(padded, 1), total)
    assert torch.equal(tree_sum(x.T, 0), total)


@pytest.mark.parametrize(
    ("columns", "width"), [(1, 1), (5, 24), (48, 96), (200, 128), (64, 1536), (17, 7168)]
)
def test_a_products_row_stands_alone(columns: int, width: int, rows_stand_alone: RowsStandAlone) -> None:
    x_TK, w_NK = torch.randn(50, width), torch.randn(columns, width)
    rows_stand_alone(lambda row_M: tiled_matmul(x_TK[row_M], w_NK), 50)
    exact = x_TK.double() @ w_NK.double().T
    assert (tiled_matmul(x_TK, w_NK) - exact).abs().max() < 2e-6 * width**0.5 * 4
