"""Block FP8: the nearest weights, one scale per 128 x 128 of them, edges and zeros included."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from k2dist.checkpoint import dequantise_block_fp8, quantise_block_fp8


def by_loops(q_NK: torch.Tensor, scale_nk: torch.Tensor) -> torch.Tensor:
    """The definition of k2_facts 2.7, block by block."""
    w_NK = q_NK.float()
    for n in range(scale_nk.shape[0]):
        for k in range(scale_nk.shape[1]):
            w_NK[128 * n : 128 * (n + 1), 128 * k : 128 * (k + 1)] *= scale_nk[n, k]
    return w_NK


@given(
    rows=st.integers(1, 400), cols=st.integers(1, 400), exponent=st.integers(-30, 30), draw=st.integers(0, 99)
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_weights_come_back_within_half_a_step(rows: int, cols: int, exponent: int, draw: int) -> None:
    w_NK = torch.randn(rows, cols, generator=torch.Generator().manual_seed(draw)) * 2.0**exponent
    q_NK, scale_nk = quantise_block_fp8(w_NK)
    assert (q_NK.dtype, tuple(q_NK.shape)) == (torch.float8_e4m3fn, (rows, cols))
    assert (scale_nk.dtype, tuple(scale_nk.shape)) == (torch.float32, (-(-rows // 128), -(-cols // 128)))
    back_NK = dequantise_block_fp8(q_NK, scale_nk)
    assert torch.equal(back_NK, by_loops(q_NK, scale_nk))
    step_NK = by_loops(torch.ones_like(q_NK, dtype=torch.float32), scale_nk)
    # 3 stored bits: half a step is 2**-4 of a normal number, and 2**-10 of the scale below 2**-6 scales
    bound_NK = torch.maximum(w_NK.abs() * 2.0**-4, step_NK * 2.0**-10) * (1 + 1e-6)
    assert bool(((back_NK - w_NK).abs() <= bound_NK).all())


def test_the_largest_of_a_block_is_448_scales() -> None:
    w_NK = torch.zeros(200, 130)
    w_NK[3, 5], w_NK[199, 129] = -7.0, 3.5
    q_NK, scale_nk = quantise_block_fp8(w_NK)
    assert scale_nk.tolist() == [[7.0 / 448, 1.0], [1.0, 3.5 / 448]]
    assert (q_NK[3, 5].item(), q_NK[199, 129].item()) == (-448.0, 448.0)


def test_kv_a_of_k2_has_five_rows_of_scales() -> None:
    _, scale_nk = quantise_block_fp8(torch.ones(576, 256))
    assert tuple(scale_nk.shape) == (5, 2)


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-38, 3e38])
def test_extreme_blocks_stay_finite(value: float) -> None:
    q_NK, scale_nk = quantise_block_fp8(torch.full((128, 128), value))
    back_NK = dequantise_block_fp8(q_NK, scale_nk)
    assert bool(torch.isfinite(back_NK).all())
    assert bool((scale_nk > 0).all())
    assert back_NK[0, 0].item() == pytest.approx(value, rel=2.0**-4, abs=1e-38)


def test_values_on_the_grid_are_kept_exactly() -> None:
    grid = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    w_NK = torch.where(grid.isnan(), torch.zeros(()), grid).repeat(128, 1) * 0.25
    q_NK, scale_nk = quantise_block_fp8(w_NK)
    assert torch.equal(dequantise_block_fp8(q_NK, scale_nk), w_NK)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    w_NK = torch.ones(130, 130)
    w_NK[129, 129] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantise_block_fp8(w_NK)
