"""Random weights of any architecture, for tests and rehearsals: reproducible, and tame when multiplied."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from k2dist.config.architecture import Architecture
from k2dist.parallel.published import SCALE_SUFFIX, Published, published_tensors


def random_tensors(architecture: Architecture, seed: int) -> dict[str, Tensor]:
    """Float32 weights by published name, without scales: what `write_checkpoint` takes.

    Linears keep the variance of their input; norm weights lie round 1; the correction bias is wide enough to
    change which experts are chosen. Embedding values have variance 1.
    """
    generator = torch.Generator().manual_seed(seed)
    return {
        tensor.name: _draw(tensor, generator)
        for tensor in published_tensors(architecture)
        if not tensor.name.endswith(SCALE_SUFFIX)
    }


def _draw(tensor: Published, generator: torch.Generator) -> Tensor:
    x = torch.randn(tensor.shape, generator=generator)
    if tensor.name == "model.embed_tokens.weight":
        return x
    if tensor.name.endswith("norm.weight"):
        return 1.0 + 0.1 * x
    if tensor.name.endswith("e_score_correction_bias"):
        return 0.1 * x
    return x / math.sqrt(tensor.shape[-1])
