"""Linears of many experts at once: row m goes through the weights of its slot.

M rows, sorted by slot; counts_e[s] of them belong to slot s. A slot may have no row, a rank no slot.
The counts may sum to less than M (a padded exchange), on a rank without slots to 0: rows of x from that sum
on are not read, rows of y from there are not computed. What either holds means nothing, NaN included; the
reference fills those of y with NaN, so that whoever reads them is found. The counts stay on the device: for
a launch M is the most that they may sum to.
N outputs, K inputs, otherwise as `fp8_gemm`: the same products and the same rounding, so that an expert's
output has the bits of a plain linear whatever else its rank computes.
Source: Kimi K2 config.json (`moe_intermediate_size`); DeepSeek-V3 report, arXiv:2412.19437, section 3.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from k2kernels.act_quant import QuantisedRows
from k2kernels.cost import Cost
from k2kernels.fp8_gemm import Linear, StoredWeight, prepare
from k2kernels.rows import tiled_matmul


@dataclass(frozen=True, slots=True)
class GroupedLinear:
    """The reference's layout: one linear per slot. `num_outputs` holds for a rank without slots too."""

    slots: tuple[Linear, ...]
    num_outputs: int
    block: int | None


def prepare_grouped(slots: Sequence[Sequence[StoredWeight]], num_outputs: int) -> GroupedLinear:
    """`slots[s]`: the parts of slot s, whose outputs follow one another (gate and up)."""
    linears = tuple(prepare(parts) for parts in slots)
    assert all(len(linear.w_NK) == num_outputs for linear in linears), f"not {num_outputs} outputs each"
    return GroupedLinear(linears, num_outputs, linears[0].block if linears else None)


def reference(
    x: Tensor | QuantisedRows, counts_e: Tensor, w: GroupedLinear, out_dtype: torch.dtype
) -> Tensor:
    x_MK = x.float()
    counts = counts_e.tolist()
    assert len(counts) == len(w.slots), f"counts for {len(counts)} slots, weights for {len(w.slots)}"
    assert sum(counts) <= len(x_MK), f"{len(x_MK)} rows, counted {sum(counts)}"
    y_MN = torch.full((len(x_MK), w.num_outputs), torch.nan, dtype=out_dtype, device=x_MK.device)
    first = 0
    for linear, count in zip(w.slots, counts, strict=True):
        if count:
            rows = slice(first, first + count)
            y_MN[rows] = tiled_matmul(x_MK[rows], linear.w_NK).to(out_dtype)
            first += count
    return y_MN


@dataclass(frozen=True, slots=True)
class Case:
    M: int
    e: int
    N: int
    K: int


CASES = [Case(M=m, e=24, N=n, K=k) for m in (0, 8, 512, 8192) for n, k in ((4096, 7168), (7168, 2048))]


def cost(case: Case) -> Cost:
    """Of rows spread over all slots: every slot's weights are read once, if there is a row for each."""
    num_slots = min(case.e, case.M)
    moved = num_slots * case.N * case.K + case.M * (case.K + 2 * case.N)
    return Cost(moved, 2 * case.M * case.N * case.K)
