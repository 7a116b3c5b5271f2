"""Triton kernels that take one row at a time: mostly with the bits of their references."""

from __future__ import annotations

import pytest
import torch
from k2kernels import (
    Rule,
    act_quant,
    latent_write,
    rmsnorm,
    rope,
    router_topk,
    swiglu,
    swiglu_quant,
    weighted_sum,
    wire,
)
from k2kernels.act_quant import QuantisedRows
from torch import Tensor

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
# On NaN and infinity: the interpreter computes in numpy, which warns where a device does not.
NOT_NUMBERS = pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")


def same_bits(x: Tensor, y: Tensor) -> bool:
    return x.dtype == y.dtype and torch.equal(
        x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8)
    )


def same_rows(x: QuantisedRows, y: QuantisedRows) -> bool:
    return same_bits(x.q_TK, y.q_TK) and same_bits(x.scale_Tk, y.scale_Tk)


@NOT_NUMBERS
@DTYPES
@pytest.mark.parametrize(("width", "block"), [(300, 128), (96, 32), (250, 100), (1, 128)])
def test_quantised_rows_have_the_references_bits(
    width: int, block: int, dtype: torch.dtype, device: torch.device
) -> None:
    x_TK = torch.randn(7, width + 3).to(dtype)[:, 3:]
    x_TK = x_TK * torch.tensor([1e-3, 1, 1e4, 1, 3, 1e-6, 30], dtype=dtype)[:, None]
    x_TK[2, -1], x_TK[3, 0], x_TK[4] = torch.nan, torch.inf, 0.0
    assert same_rows(act_quant.launch(x_TK, block), act_quant.reference(x_TK, block))


def test_rounding_to_e4m3_crosses_powers_of_two(device: torch.device) -> None:
    """7.99 is 8, not 4, as the interpreter's own cast has it; a largest value of 448 makes the scale 1."""
    grid = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    between = (grid[1:] + grid[:-1]) / 2
    x = torch.cat((grid, between, between * (1 + 2**-20), between * (1 - 2**-20), torch.tensor([7.99])))
    x_TK = torch.cat((x, -x, torch.zeros(-2 * len(x) % 127))).view(-1, 127)
    x_TK = torch.cat((x_TK, torch.full((len(x_TK), 1), 448.0)), dim=1)
    rows = act_quant.launch(x_TK, 128)
    assert (rows.scale_Tk == 1.0).all()
    assert same_bits(rows.q_TK, x_TK.to(torch.float8_e4m3fn))


@NOT_NUMBERS
@DTYPES
def test_swiglu_is_the_reference_to_a_rounding(dtype: torch.dtype, device: torch.device) -> None:
    h_TG = (torch.randn(7, 2600) * 3).to(dtype)
    h_TG[1, 0], h_TG[2, 1], h_TG[2, 1301] = torch.nan, -200.0, 200.0
    y_TF = swiglu.launch(h_TG)
    assert y_TF.dtype == dtype
    rtol = 2e-6 if dtype == torch.float32 else 2**-7
    wanted = swiglu.reference(h_TG).float()
    assert torch.allclose(y_TF.float(), wanted, rtol=rtol, atol=1e-30, equal_nan=True)
    assert same_rows(swiglu_quant.launch(h_TG, 128), act_quant.launch(y_TF, 128)), "one pass or two"


@DTYPES
@pytest.mark.parametrize("width", [1, 300, 1536])
def test_rmsnorm_is_the_reference_to_a_rounding(width: int, dtype: torch.dtype, device: torch.device) -> None:
    x_TD = torch.full((5, 2000), torch.nan, dtype=dtype)
    x_TD[:, 100 : 100 + width] = torch.randn(5, width).to(dtype)
    x_TD, weight_D = x_TD[:, 100 : 100 + width], torch.randn(width).to(dtype)
    y_TD = rmsnorm.launch(x_TD, weight_D, 1e-6)
    assert y_TD.dtype == dtype
    rtol = 2e-6 if dtype == torch.float32 else 2**-6
    assert torch.allclose(y_TD.float(), rmsnorm.reference(x_TD, weight_D, 1e-6).float(), rtol=rtol, atol=0)


@DTYPES
@pytest.mark.parametrize(("num_heads", "width"), [(1, 64), (5, 40), (17, 2)])
def test_rope_has_the_references_bits(
    num_heads: int, width: int, dtype: torch.dtype, device: torch.device
) -> None:
    x_THR = torch.randn(6, num_heads, width + 56).to(dtype)[..., 56:]
    angle_TF = torch.rand(6, width // 2) * 6
    cos_TF, sin_TF = angle_TF.cos(), angle_TF.sin()
    assert same_bits(rope.launch(x_THR, cos_TF, sin_TF), rope.reference(x_THR, cos_TF, sin_TF))


@DTYPES
def test_weighted_sums_have_the_references_bits(dtype: torch.dtype, device: torch.device) -> None:
    out_TKD, weight_TK, shared_TD = torch.randn(6, 8, 1100).to(dtype), torch.rand(6, 8), torch.randn(6, 1100)
    for out_dtype in (torch.float32, torch.bfloat16):
        wanted = weighted_sum.reference(out_TKD, weight_TK, shared_TD, out_dtype)
        assert same_bits(weighted_sum.launch(out_TKD, weight_TK, shared_TD, out_dtype), wanted)


def test_latent_write_touches_its_places_only(device: torch.device) -> None:
    cache_CD = torch.full((10, 40), torch.nan, dtype=torch.bfloat16)
    x_TD, place_T = torch.randn(2, 60), torch.tensor([7, 2])
    wanted = cache_CD.clone()
    latent_write.reference_(wanted, place_T, x_TD[:, :32], x_TD[:, 50:58])
    latent_write.launch_(cache_CD, place_T, x_TD[:, :32], x_TD[:, 50:58])
    assert same_bits(cache_CD, wanted)


@DTYPES
@pytest.mark.parametrize("num_rows", [0, 1, 5])
def test_wire_rows_have_the_references_bytes(num_rows: int, dtype: torch.dtype, device: torch.device) -> None:
    x_TD = torch.randn(num_rows, 300).to(dtype)
    row_TW = wire.pack_on_device(x_TD, 128)
    assert same_bits(row_TW, wire.pack(x_TD, 128))
    assert wire.pack_on_device(x_TD, None) is x_TD
    for rows_TW in (row_TW, torch.cat((row_TW, row_TW), dim=1)[:, row_TW.shape[1] :]):
        back = wire.unpack_on_device(rows_TW, 300, 128)
        assert isinstance(back, QuantisedRows)
        assert same_rows(back, act_quant.reference(x_TD, 128))


def rule(top_k: int, num_groups: int = 1, top_k_groups: int = 1, normalises: bool = True) -> Rule:
    return Rule(
        top_k=top_k, num_groups=num_groups, top_k_groups=top_k_groups, normalises=normalises, scale=2.827
    )


@NOT_NUMBERS
@pytest.mark.parametrize(
    ("num_experts", "how"),
    [
        (12, rule(3)),
        (384, rule(8)),
        (16, rule(4, num_groups=4, top_k_groups=2)),
        (12, rule(2, num_groups=12, top_k_groups=3)),
        (12, rule(3, normalises=False)),
    ],
)
def test_the_router_chooses_as_the_reference(num_experts: int, how: Rule, device: torch.device) -> None:
    """Ties go to the lower expert and group; NaN wins, and never yields an expert that is not there."""
    logit_TE, bias_E = torch.randn(12, num_experts) * 2, torch.randn(num_experts) * 0.3
    logit_TE[1], logit_TE[2, 3], logit_TE[3], logit_TE[4] = torch.nan, torch.nan, -200.0, 0.0
    for bias in (bias_E, torch.zeros(num_experts)):
        expert_TK, weight_TK = router_topk.launch(logit_TE, bias, how)
        wanted_TK, wanted_weight_TK = router_topk.reference(logit_TE, bias, how)
        assert torch.equal(expert_TK, wanted_TK)
        assert torch.allclose(weight_TK, wanted_weight_TK, rtol=1e-5, atol=0, equal_nan=True)


@DTYPES
def test_no_rows(dtype: torch.dtype, device: torch.device) -> None:
    x_TD = torch.empty(0, 256, dtype=dtype)
    weight_T0, angle_TF = torch.empty(0, 8), torch.empty(0, 32)
    assert act_quant.launch(x_TD, 128).q_TK.shape == (0, 256)
    assert swiglu.launch(x_TD).shape == (0, 128)
    assert swiglu_quant.launch(x_TD, 128).scale_Tk.shape == (0, 1)
    assert rmsnorm.launch(x_TD, torch.ones(256, dtype=dtype), 1e-6).shape == (0, 256)
    assert rope.launch(x_TD.view(0, 4, 64), angle_TF, angle_TF).shape == (0, 4, 64)
    assert weighted_sum.launch(x_TD.view(0, 8, 32), weight_T0, weight_T0.view(0, 32), dtype).shape == (0, 32)
    assert router_topk.launch(x_TD.float(), torch.zeros(256), rule(8))[0].shape == (0, 8)
    latent_write.launch_(torch.empty(4, 256, dtype=dtype), torch.arange(0), x_TD[:, :200], x_TD[:, 200:])


def test_a_wrong_argument_is_named() -> None:
    x_TD = torch.randn(2, 256)
    with pytest.raises(ValueError, match=r"^weight_D: shape \[255\], expected \[256\]"):
        rmsnorm.launch(x_TD, torch.ones(255), 1e-6)
    with pytest.raises(ValueError, match=r"^h_TG: 255 columns are not two halves"):
        swiglu.launch(x_TD[:, 1:])
    with pytest.raises(ValueError, match=r"^rule.top_k: 9 of 8 experts in the best groups"):
        router_topk.launch(torch.randn(1, 8), torch.zeros(8), rule(9))
    with pytest.raises(ValueError, match=r"^x_TD: 255 columns; scales behind them"):
        wire.pack_on_device(x_TD[:, 1:], 128)
