"""A matrix per head: y[t, h] = x[t, h] w[h]. Carries queries into the latent space and values out of it.

T tokens (may be 0), H heads, K inputs, N outputs. x and y share a dtype, and w (float32 here) holds
values of that dtype; sums are float32, rounded once.

    q_latent = q_nope W_UK    K = 128, N = 512           out = o_latent W_UV^T    K = 512, N = 128

Source: DeepSeek-V2 report, arXiv:2405.04434, section 2.1.2 (W_UK goes into W_Q, W_UV into W_O).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from k2kernels.cost import Cost
from k2kernels.rows import TILE_ROWS, padded_rows


def reference(x_THK: Tensor, w_HKN: Tensor) -> Tensor:
    num_tokens, num_heads, _ = x_THK.shape
    y_THN = torch.empty(num_tokens, num_heads, w_HKN.shape[2], dtype=x_THK.dtype, device=x_THK.device)
    for first in range(0, num_tokens, TILE_ROWS):
        tile_IHK = padded_rows(x_THK[first : first + TILE_ROWS].float(), TILE_ROWS)
        y_HIN = torch.bmm(tile_IHK.transpose(0, 1).contiguous(), w_HKN)
        y_THN[first : first + TILE_ROWS] = y_HIN.transpose(0, 1)[: num_tokens - first]
    return y_THN


@dataclass(frozen=True, slots=True)
class Case:
    T: int
    H: int
    K: int
    N: int


CASES = [
    Case(T=t, H=h, K=k, N=n) for t in (0, 1, 64, 256) for h in (8, 64) for k, n in ((128, 512), (512, 128))
]


def cost(case: Case) -> Cost:
    moved = 2 * case.H * (case.K * case.N + case.T * (case.K + case.N))
    return Cost(moved, 2 * case.T * case.H * case.K * case.N)
