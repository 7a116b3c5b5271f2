"""Dynamic float8 quantisation of activations: one scale per token and `block` contiguous channels.

    scale = max(|x|, 1e-4) / 448 over the group,  q = x / scale rounded to the nearest e4m3 (ties to even)

T tokens (may be 0), K channels, k = ceil(K / block) groups; a short last group has its own scale.
x: bfloat16 or float32. q: float8_e4m3fn, scale: float32. Zeros give q = 0; NaN makes its group NaN.
Source: DeepSeek-V3, inference/kernel.py, act_quant (arXiv:2412.19437, section 3.3.2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from k2kernels.cost import Cost

E4M3_MAX = 448.0
SMALLEST_AMAX = 1e-4


@dataclass(frozen=True, slots=True)
class QuantisedRows:
    """Rows of float8 with their scales; the value is q * scale."""

    q_TK: Tensor
    scale_Tk: Tensor
    block: int

    def float(self) -> Tensor:
        """The float32 values that the rows stand for: [T, K]."""
        num_tokens, num_groups = self.scale_Tk.shape
        grouped_TkG = _grouped(self.q_TK.float(), self.block) * self.scale_Tk[:, :, None]
        return grouped_TkG.reshape(num_tokens, num_groups * self.block)[:, : self.q_TK.shape[1]]

    def __getitem__(self, row_M: Tensor) -> QuantisedRows:
        """The rows numbered `row_M`, in that order. Bytes are moved: torch cannot index every float8."""
        q_MK = self.q_TK.view(torch.uint8)[row_M].view(self.q_TK.dtype)
        return QuantisedRows(q_MK, self.scale_Tk[row_M], self.block)


def reference(x_TK: Tensor, block: int) -> QuantisedRows:
    num_tokens, num_channels = x_TK.shape
    grouped_TkG = _grouped(x_TK.float(), block)
    scale_Tk = grouped_TkG.abs().amax(-1).clamp_min(SMALLEST_AMAX) / E4M3_MAX
    # Dividing may round just past 448, which the cast would turn into NaN.
    q_TkG = (grouped_TkG / scale_Tk[:, :, None]).clamp(-E4M3_MAX, E4M3_MAX)
    q_TK = q_TkG.reshape(num_tokens, scale_Tk.shape[1] * block)[:, :num_channels].contiguous()
    return QuantisedRows(q_TK.to(torch.float8_e4m3fn), scale_Tk, block)


def _grouped(x_TK: Tensor, block: int) -> Tensor:
    """[T, k, block], the last group filled up with zeros."""
    num_tokens, num_channels = x_TK.shape
    num_groups = -(-num_channels // block)
    return pad(x_TK, (0, num_groups * block - num_channels)).view(num_tokens, num_groups, block)


@dataclass(frozen=True, slots=True)
class Case:
    T: int
    K: int


CASES = [Case(T=t, K=k) for t in (0, 1, 64, 4096) for k in (512, 1536, 2048, 7168, 18432)]


def cost(case: Case) -> Cost:
    num_groups = -(-case.K // 128)
    return Cost(case.T * (case.K * 3 + num_groups * 4), 3 * case.T * case.K)
