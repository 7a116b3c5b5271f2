"""The router's logits in float32: x w^T with float32 weights.

T tokens (may be 0), D width, E experts. x: bfloat16 or float32; w and the result: float32. Half precision
here flips experts. Source: DeepSeek-V3, inference/model.py, Gate; k2_facts 2.5.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from k2kernels.cost import Cost
from k2kernels.rows import tiled_matmul


def reference(x_TD: Tensor, w_ED: Tensor) -> Tensor:
    assert w_ED.dtype == torch.float32, f"the router's weights are float32, not {w_ED.dtype}"
    return tiled_matmul(x_TD, w_ED)


@dataclass(frozen=True, slots=True)
class Case:
    T: int
    E: int = 384
    D: int = 7168


CASES = [Case(T=t) for t in (0, 1, 64, 4096)]


def cost(case: Case) -> Cost:
    moved = 2 * case.T * case.D + 4 * case.E * case.D + 4 * case.T * case.E
    return Cost(moved, 2 * case.T * case.E * case.D)
