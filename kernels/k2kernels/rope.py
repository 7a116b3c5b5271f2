"""Rotary positions on interleaved pairs: (x[2i], x[2i+1]) turns by the angle of pair i.

    a' = a cos - b sin,  b' = b cos + a sin

T tokens (may be 0), H heads, R rotary width, F = R / 2 pairs. x and the result share a dtype; angles and
arithmetic are float32, rounded once. cos_TF, sin_TF: float32, of each token's position.
Source: Su et al. 2021, arXiv:2104.09864, eq. 15; the pairs are neighbours in K2's weights, not halves.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from k2kernels.cost import Cost


def reference(x_THR: Tensor, cos_TF: Tensor, sin_TF: Tensor) -> Tensor:
    a_THF, b_THF = x_THR[..., 0::2].float(), x_THR[..., 1::2].float()
    cos_T1F, sin_T1F = cos_TF[:, None], sin_TF[:, None]
    turned = (a_THF * cos_T1F - b_THF * sin_T1F, b_THF * cos_T1F + a_THF * sin_T1F)
    return torch.stack(turned, dim=-1).flatten(-2).to(x_THR.dtype)


@dataclass(frozen=True, slots=True)
class Case:
    T: int
    H: int
    R: int = 64


CASES = [Case(T=t, H=h) for t in (0, 1, 64, 4096) for h in (1, 8, 64)]


def cost(case: Case) -> Cost:
    return Cost(case.T * case.R * (4 * case.H + 4), 3 * case.T * case.H * case.R)
