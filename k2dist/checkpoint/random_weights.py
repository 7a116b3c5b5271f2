"""Random weights of any architecture, for tests and rehearsals: reproducible, and tame when multiplied."""

from __future__ import annotations

import math
from collections.abc import Sequence

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


def spread(name: str, shape: Sequence[int]) -> tuple[float, float]:
    """Mean and standard deviation of the values of a published tensor of `shape`."""
    if name == "model.embed_tokens.weight":
        return 0.0, 1.0
    if name.endswith("norm.weight"):
        return 1.0, 0.1
    if name.endswith("e_score_correction_bias"):
        return 0.0, 0.1
    return 0.0, 1.0 / math.sqrt(shape[-1])


def _draw(tensor: Published, generator: torch.Generator) -> Tensor:
    mean, deviation = spread(tensor.name, tensor.shape)
    return torch.randn(tensor.shape, generator=generator).mul_(deviation).add_(mean)
