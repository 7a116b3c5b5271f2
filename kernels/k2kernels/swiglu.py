"""SwiGLU's middle: y = silu(gate) * up, where h = [gate | up].

T rows (may be 0), F width. h and y share a dtype; silu(x) = x / (1 + e^-x) and the product are float32, and
rounded once. Source: Shazeer 2020, arXiv:2002.05202, eq. 6; Kimi K2 config.json (`hidden_act`: silu).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from k2kernels.cost import Cost
from k2kernels.rows import sigmoid


def reference(h_TG: Tensor) -> Tensor:
    """`h_TG`: [T, 2F]. Result: [T, F]."""
    gate_TF, up_TF = h_TG.float().chunk(2, dim=-1)
    return (gate_TF * sigmoid(gate_TF) * up_TF).to(h_TG.dtype)


@dataclass(frozen=True, slots=True)
class Case:
    T: int
    F: int


CASES = [Case(T=t, F=f) for t in (0, 1, 64, 8192) for f in (2048, 2304)]


def cost(case: Case) -> Cost:
    return Cost(2 * 3 * case.T * case.F, 6 * case.T * case.F)
