"""Probabilities in whole numbers: sums that no order can change.

A token weighs exp(its distance from the row's largest), in units of 2**-44. Up to 2**18 tokens sum within an
int64; what rounding loses is at most 2**-45 of the largest token's weight for each token, 5e-9 for all of
K2's vocabulary together and 1e-11 when errors do not conspire.
"""

from __future__ import annotations

import torch
from torch import Tensor

ONE = 2.0**44
MAX_VOCABULARY = 2**18

# Temporaries of a few float64 per element: on a CPU they should stay in the cache (2 MB), elsewhere be few.
_CPU_TILE = 2**18
_DEVICE_TILE = 2**24


def mass(distance_NC: Tensor) -> Tensor:
    """Int64 [N, C] of float64 distances from the largest, all at most 0."""
    return distance_NC.exp().mul_(ONE).round_().long()


def total_mass(logits_Nv: Tensor, largest_N1: Tensor, temperature_N1: Tensor) -> Tensor:
    """Int64 [N]: the mass of all columns. Float32, float64 and float64."""
    parts = [
        mass((logits_Nv[rows].double() - largest_N1[rows]).div_(temperature_N1[rows])).sum(dim=1)
        for rows in tiles(logits_Nv)
    ]
    return torch.cat(parts) if parts else logits_Nv.new_empty(0, dtype=torch.int64)


def tiles(logits_Nv: Tensor) -> list[slice]:
    """Rows in runs whose float64 temporaries are small. No row's bits depend on the cut."""
    num_rows, width = logits_Nv.shape
    height = max((_CPU_TILE if logits_Nv.device.type == "cpu" else _DEVICE_TILE) // width, 1)
    return [slice(row, row + height) for row in range(0, num_rows, height)]
