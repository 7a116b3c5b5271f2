"""The latent cache's size and its angles."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from k2kernels import KernelSet

from k2dist.model.latent_cache import LatentCache

if TYPE_CHECKING:
    from tests.model.conftest import Rig


def test_a_token_of_k2_takes_70272_bytes(rig: Rig) -> None:
    architecture = rig.architecture(
        num_layers=61, kv_lora_rank=512, qk_rope_head_dim=64, max_positions=131072
    )
    cache = LatentCache.allocate(architecture, 3, 64, KernelSet.reference(torch.bfloat16))
    assert cache.num_bytes == 3 * 64 * 70272
    assert {layer.dtype for layer in cache.layers} == {torch.bfloat16}


def test_angles_reach_as_far_as_pages_or_the_context(rig: Rig) -> None:
    kernels = KernelSet.reference(torch.float32)
    architecture = rig.architecture(max_positions=100)
    assert len(LatentCache.allocate(architecture, 3, 16, kernels).rope.cos_PF) == 48
    assert len(LatentCache.allocate(architecture, 30, 16, kernels).rope.cos_PF) == 100
