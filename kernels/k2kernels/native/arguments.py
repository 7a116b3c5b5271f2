"""What goes to C: arguments checked, by name, and made into its structures."""

from __future__ import annotations

import torch
from torch import Tensor

from k2kernels.act_quant import QuantisedRows
from k2kernels.native.library import OUT_BF16, OUT_F32, ROWS_BF16, ROWS_E4M3, Cache, Rows, TopkRule
from k2kernels.native.packed import PackedLinear
from k2kernels.router_topk import Rule

OUT_KIND = {torch.bfloat16: OUT_BF16, torch.float32: OUT_F32}


def rows_of(x: Tensor | QuantisedRows, w: PackedLinear, row_M: Tensor | None) -> tuple[Rows, int]:
    """Activations for C, and how many rows; `row_M` picks and orders them. `x` must outlive the call."""
    if isinstance(x, QuantisedRows):
        assert x.block == w.block, f"activations quantised in groups of {x.block}, weights of {w.block}"
        data, kind, scale = x.q_TK, ROWS_E4M3, x.scale_Tk
        check(data, "x", torch.float8_e4m3fn, 2)
        check(scale, "the scales of x", torch.float32, 2)
    else:
        data, kind, scale = x, ROWS_BF16, None
        check(data, "x", torch.bfloat16, 2)
    num_rows, width = data.shape
    if w.num_slots and num_rows:
        assert width == w.num_inputs, f"x has {width} columns, the weights {w.num_inputs} inputs"
    if row_M is not None:
        assert row_M.is_contiguous(), "row numbers are contiguous"
        check(row_M, "row numbers", torch.int64, 1)
        num_rows = row_M.shape[0]
    return Rows(
        kind=kind,
        num_rows=num_rows,
        stride_bytes=data.stride(0) * data.element_size(),
        data=data.data_ptr(),
        scale_stride_bytes=0 if scale is None else scale.stride(0) * 4,
        scale=None if scale is None else scale.data_ptr(),
        index=None if row_M is None else row_M.data_ptr(),
    ), num_rows


def counts_of(counts_e: Tensor, w: PackedLinear, num_rows: int) -> Tensor:
    assert counts_e.shape[0] == w.num_slots, f"counts for {counts_e.shape[0]} slots, not {w.num_slots}"
    counts_e = check(counts_e.contiguous(), "counts", torch.int64, 1)
    total = int(counts_e.sum())
    assert total <= num_rows, f"{num_rows} rows, counted {total}"  # rows past the sum are nobody's
    return counts_e


def cache_of(cache_CD: Tensor, page_tokens: int) -> Cache:
    assert cache_CD.is_contiguous(), "the cache is contiguous"
    assert cache_CD.dtype == torch.bfloat16, f"a cache of {cache_CD.dtype}, expected bfloat16"
    return Cache(cache_CD.data_ptr(), cache_CD.shape[1], page_tokens)


def rule_of(rule: Rule) -> TopkRule:
    return TopkRule(rule.top_k, rule.num_groups, rule.top_k_groups, rule.normalises, rule.scale)


def check(x: Tensor, name: str, dtype: torch.dtype, dim: int) -> Tensor:
    """A CPU tensor of this dtype, its last axis contiguous. 30 of these run per layer, so one look first."""
    if x.dtype == dtype and x.dim() == dim and x.stride(-1) == 1 and x.is_cpu:
        return x
    assert x.dtype == dtype, f"{name} is {x.dtype}, expected {dtype}"
    assert x.dim() == dim, f"{name} has {x.dim()} axes, expected {dim}"
    assert x.stride(-1) == 1 or x.shape[-1] <= 1, f"{name}: its last axis is not contiguous"
    assert x.is_cpu, f"{name} is on {x.device}, these are kernels for the CPU"
    return x
