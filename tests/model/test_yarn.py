"""Golden numbers of K2's rotary angles (k2_facts 2.4)."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

import pytest
import torch

from k2dist.config import Architecture, Yarn
from k2dist.model.yarn import inv_freq, rope_table

if TYPE_CHECKING:
    from tests.model.conftest import Rig


def k2(rig: Rig, factor: float | None = 32.0, beta_fast: float = 1.0, mscale: float = 1.0) -> Architecture:
    yarn = None
    if factor is not None:
        yarn = Yarn(
            factor=factor,
            original_max_positions=4096,
            beta_fast=beta_fast,
            beta_slow=1.0,
            mscale=mscale,
            mscale_all_dim=1.0,
        )
    return rig.architecture(
        qk_nope_head_dim=128, qk_rope_head_dim=64, rope_theta=50000.0, yarn=yarn, max_positions=131072
    )


GOLDEN = {
    32.0: {
        0: 1.0,
        1: 0.713111084911932,
        18: 0.0022742037565,
        19: 0.0016217599081,
        20: 3.61404677e-05,
        21: 2.57721682e-05,
        31: 8.764412912e-07,
    },
    64.0: {
        0: 1.0,
        1: 0.713111084911932,
        18: 0.0022742037565,
        19: 0.0016217599081,
        20: 1.80702339e-05,
        21: 1.28860838e-05,
        31: 4.382206456e-07,
    },
}


@pytest.mark.parametrize("factor", GOLDEN)
def test_frequencies_are_k2s(rig: Rig, factor: float) -> None:
    freq_F = inv_freq(k2(rig, factor))
    assert freq_F.dtype == torch.float32
    assert len(freq_F) == 32
    for pair, expected in GOLDEN[factor].items():
        assert float(freq_F[pair]) == pytest.approx(expected, rel=3e-7), f"pair {pair}"


def test_a_wide_ramp_is_a_ramp(rig: Rig) -> None:
    """K2.5's beta_fast = 32: unscaled up to pair 8, scaled from 20 on, between them in between."""
    plain_F, freq_F = inv_freq(k2(rig, None)), inv_freq(k2(rig, 32.0, beta_fast=32.0))
    ratio = (plain_F / freq_F).tolist()
    assert ratio[:9] == pytest.approx([1.0] * 9)
    assert ratio[20:] == pytest.approx([32.0] * 12)
    assert all(1.0 < a < b < 32.0 for a, b in itertools.pairwise(ratio[9:20]))


def test_softmax_scale_has_the_temperature_squared(rig: Rig) -> None:
    assert k2(rig, None).softmax_scale == pytest.approx(0.07216878365, rel=1e-9)
    assert k2(rig, 32.0).softmax_scale == pytest.approx(0.13086079996, rel=1e-9)
    assert k2(rig, 64.0).softmax_scale == pytest.approx(0.14467962580, rel=1e-9)


def test_angles_hold_to_the_last_position(rig: Rig) -> None:
    """In float32 angles: the product is rounded once, its cosine is exact to 1e-6."""
    architecture = k2(rig)
    table = rope_table(architecture, 131072)
    assert table.cos_PF.shape == table.sin_PF.shape == (131072, 32)
    freq_F = inv_freq(architecture)
    for position in (0, 1, 4095, 4096, 131071):
        angle_F = (torch.tensor(float(position)) * freq_F).double()
        assert torch.allclose(table.cos_PF[position].double(), angle_F.cos(), atol=1e-6)
        assert torch.allclose(table.sin_PF[position].double(), angle_F.sin(), atol=1e-6)


def test_cosines_are_scaled_only_where_the_mscales_differ(rig: Rig) -> None:
    assert float(rope_table(k2(rig), 1).cos_PF[0, 0]) == 1.0
    expected = (0.1 * 2.0 * math.log(32.0) + 1.0) / (0.1 * math.log(32.0) + 1.0)
    assert float(rope_table(k2(rig, mscale=2.0), 1).cos_PF[0, 0]) == pytest.approx(expected)
