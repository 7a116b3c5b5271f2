"""Assembling a rank's weights: every tensor used once, names and shapes said when not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from k2kernels import KernelSet
from torch import Tensor

from k2dist.checkpoint import dequantise_block_fp8
from k2dist.config import Architecture
from k2dist.errors import CheckpointError
from k2dist.model.weights import Weights, assemble
from k2dist.parallel import Layout, first_layout

if TYPE_CHECKING:
    from tests.model.conftest import Rig

KERNELS = KernelSet.reference(torch.float32)


@pytest.fixture
def architecture(rig: Rig) -> Architecture:
    return rig.architecture()


@pytest.fixture
def tensors(rig: Rig, architecture: Architecture) -> dict[str, Tensor]:
    return rig.published(architecture)


def build(tensors: dict[str, Tensor], architecture: Architecture) -> Weights:
    place = first_layout(architecture, lanes=1, tp=1).place(0)
    return assemble(dict(tensors), architecture, place, 1, KERNELS)


def test_a_missing_tensor_is_named(architecture: Architecture, tensors: dict[str, Tensor]) -> None:
    name = "model.layers.1.mlp.experts.5.down_proj.weight_scale_inv"
    del tensors[name]
    with pytest.raises(CheckpointError, match=f"^{name}: needed by this rank"):
        build(tensors, architecture)


def test_an_extra_tensor_is_named(architecture: Architecture, tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.2.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    with pytest.raises(
        CheckpointError, match=r"1 tensors .*model\.layers\.2\.self_attn\.rotary_emb\.inv_freq"
    ):
        build(tensors, architecture)


def test_a_shape_that_does_not_fit_is_named(architecture: Architecture, tensors: dict[str, Tensor]) -> None:
    """Ragged scales: 40 rows in blocks of 16 have three, not two."""
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv"
    tensors[name] = tensors[name][:2]
    with pytest.raises(CheckpointError, match=r"shape \[2, 4\], this rank needs \[3, 4\]"):
        build(tensors, architecture)


def test_the_caller_keeps_its_mapping(architecture: Architecture, tensors: dict[str, Tensor]) -> None:
    names = set(tensors)
    build(tensors, architecture)
    assert set(tensors) == names


def test_kv_b_parts_are_key_first_per_head(architecture: Architecture, tensors: dict[str, Tensor]) -> None:
    weights = build(tensors, architecture)
    assert weights.lane is not None
    name = "model.layers.1.self_attn.kv_b_proj.weight"
    plain = dequantise_block_fp8(tensors[name], tensors[name + "_scale_inv"], architecture.scale_block or 0)
    mla = weights.lane.layers[1].attention
    assert torch.equal(mla.w_uk_hNL[2], plain[64:80])  # head 2: rows 64-79 key, 80-95 value
    assert torch.equal(mla.w_uv_hLV[2], plain[80:96].T)


def test_a_rank_without_a_lane_holds_experts_only(
    rig: Rig, architecture: Architecture, tensors: dict[str, Tensor]
) -> None:
    layout: Layout = first_layout(architecture, lanes=1, tp=1, expert_only_ranks=1)
    cut = rig.cut_for(tensors, architecture, layout, 1)
    weights = assemble(cut, architecture, layout.place(1), 1, KERNELS)
    assert weights.lane is None
    assert [len(experts.gate_up.slots) for experts in weights.experts] == [6, 6]


def test_slices_of_tp_ranks_make_up_the_whole(
    rig: Rig, architecture: Architecture, tensors: dict[str, Tensor]
) -> None:
    layout = first_layout(architecture, lanes=1, tp=2)
    whole = build(tensors, architecture).lane
    parts = [
        assemble(
            rig.cut_for(tensors, architecture, layout, w), architecture, layout.place(w), 2, KERNELS
        ).lane
        for w in (0, 1)
    ]
    assert whole is not None
    assert parts[0] is not None
    assert parts[1] is not None
    assert [part.first_token for part in parts if part] == [0, 64]
    assert torch.equal(torch.cat([part.head_vD for part in parts if part]), whole.head_vD)
    o_parts = [part.layers[0].attention.o.w_NK for part in parts if part]
    assert torch.equal(torch.cat(o_parts, dim=1), whole.layers[0].attention.o.w_NK)
    uk_parts = [part.layers[0].attention.w_uk_hNL for part in parts if part]
    assert torch.equal(torch.cat(uk_parts), whole.layers[0].attention.w_uk_hNL)
