"""Rows as bytes, and their sum in rank order: what every transport shares.

gloo has no float8, and torch cannot index or concatenate every dtype: rows travel as uint8.

Legend: N rows, D columns of any dtype, B bytes of one row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_bytes(x_ND: Tensor) -> Tensor:
    """The same rows as uint8 [N, B]; a view where `x_ND` is contiguous."""
    assert x_ND.dim() == 2, f"rows are two-dimensional, not {tuple(x_ND.shape)}"
    return x_ND.contiguous().view(torch.uint8)


def from_bytes(x_NB: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of `dtype` from the bytes that `to_bytes` gave; a view of `x_NB` where that is aligned."""
    is_dense = x_NB.stride(0) == x_NB.shape[1] > 0
    if is_dense and x_NB.storage_offset() % dtype.itemsize == 0:
        return x_NB.view(dtype)
    # Not contiguous(): that lets a slice of one row, or of none, keep any stride and offset.
    x_ND = torch.empty(len(x_NB), x_NB.shape[1] // dtype.itemsize, dtype=dtype, device=x_NB.device)
    x_ND.view(torch.uint8).copy_(x_NB)
    return x_ND


def check_counts(x_ND: Tensor, send: Sequence[int], recv: Sequence[int], size: int) -> None:
    """Assert that every row has one destination and every rank one count."""
    assert len(send) == len(recv) == size, f"{len(send)} send and {len(recv)} receive counts for {size} ranks"
    assert sum(send) == len(x_ND), f"{sum(send)} rows to send, {len(x_ND)} given"


def sum_in_order(addend_ND: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """((x0 + x1) + x2) + ... in float32, rounded once to `dtype`; never aliases an addend."""
    total_ND = addend_ND[0].clone()
    for x_ND in addend_ND[1:]:
        total_ND += x_ND
    return total_ND.to(dtype)
