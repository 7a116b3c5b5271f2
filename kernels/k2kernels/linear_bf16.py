"""An unquantised linear with float32 sums: y = x w^T. The head is one.

T tokens (may be 0), N outputs, K inputs. x and w: bfloat16 or float32; y is rounded once, to `out_dtype`
(float32 for logits). A library call would change a row's bits with T; this op may not.
Source: k2_facts 2.7 lists what is not quantised; PyTorch's `nn.Linear` is the mathematics.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from k2kernels import fp8_gemm
from k2kernels.cost import Cost
from k2kernels.rows import tiled_matmul


def prepare(w_NK: Tensor) -> Tensor:
    """The reference's layout: the same values in float32, contiguous."""
    return w_NK.float().contiguous()


def reference(x_TK: Tensor, w_NK: Tensor, out_dtype: torch.dtype) -> Tensor:
    return tiled_matmul(x_TK, w_NK).to(out_dtype)


def prepare_stored(w_NK: Tensor) -> Tensor:
    """The Triton kernels' layout: as it is, contiguous. Where x is bfloat16 too, the tensor core is used."""
    return w_NK.contiguous()


def launch(x_TK: Tensor, w_NK: Tensor, out_dtype: torch.dtype) -> Tensor:
    """As `reference`: the kernel of `fp8_gemm`, which takes weights without scales too."""
    return fp8_gemm.launch(x_TK, fp8_gemm.StoredLinear(w_NK, None, None, 1), out_dtype)


@dataclass(frozen=True, slots=True)
class Case:
    T: int
    N: int
    K: int


CASES = [Case(T=t, N=n, K=7168) for t in (0, 1, 64, 256) for n in (163840, 20480)]


def cost(case: Case) -> Cost:
    return Cost(2 * (case.N + case.T) * case.K + 4 * case.T * case.N, 2 * case.T * case.N * case.K)
