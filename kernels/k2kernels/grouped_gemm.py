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

from k2kernels import product
from k2kernels.act_quant import QuantisedRows
from k2kernels.arguments import INT64, check_tensor, require
from k2kernels.cost import Cost
from k2kernels.fp8_gemm import Linear, StoredWeight, prepare, prepare_stored
from k2kernels.product import Rows, Tiles, choose_tiles
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
class StackedLinear(GroupedLinear):
    """The Triton kernels' layout: as `StoredLinear`, all slots in one tensor; `slots` is empty."""

    w_eNK: Tensor
    scale_enk: Tensor | None
    row_block: int


def prepare_stacked(slots: Sequence[Sequence[StoredWeight]], num_outputs: int) -> StackedLinear:
    """As `prepare_grouped`. Slots are laid out one by one: never two copies of all of them."""
    if not slots:
        return StackedLinear((), num_outputs, None, torch.empty(0, num_outputs, 0), None, 1)
    first = prepare_stored(slots[0])
    shape = first.w_NK.shape
    require(shape[0] == num_outputs, f"slots: {shape[0]} outputs, expected {num_outputs}")
    w_eNK = torch.empty(len(slots), *shape, dtype=first.w_NK.dtype, device=first.w_NK.device)
    scale_enk = (
        None if first.scale_nk is None else first.scale_nk.new_empty(len(slots), *first.scale_nk.shape)
    )
    for slot, parts in enumerate(slots):
        linear = prepare_stored(parts)
        w_eNK[slot].view(torch.uint8).copy_(linear.w_NK.view(torch.uint8))
        if scale_enk is not None and linear.scale_nk is not None:
            scale_enk[slot] = linear.scale_nk
    return StackedLinear((), num_outputs, first.block, w_eNK, scale_enk, first.row_block)


def launch(
    x: Tensor | QuantisedRows,
    counts_e: Tensor,
    w: GroupedLinear,
    out_dtype: torch.dtype,
    tiles: Tiles | None = None,
) -> Tensor:
    """As `reference`, but nobody compares the sum of `counts_e` with M: that would wait for the device.

    `tiles`: for tests and measurements; any of `product.all_tiles` gives the same bits.
    """
    require(isinstance(w, StackedLinear), f"w: {type(w).__name__}, expected what `prepare_stacked` gives")
    assert isinstance(w, StackedLinear)
    num_slots, num_outputs, num_inputs = w.w_eNK.shape
    if num_slots == 0:
        x_MK = x if isinstance(x, Tensor) else x.q_TK
        return torch.empty(len(x_MK), num_outputs, dtype=out_dtype, device=x_MK.device)
    rows = Rows.of(x, w.w_eNK.dtype, w.block, num_inputs)
    num_rows, device = len(rows.x_TK), rows.x_TK.device
    check_tensor("counts_e", counts_e, (num_slots,), INT64, device)
    weights = product.Weights(w.w_eNK, w.scale_enk, w.block, w.row_block)
    weights.check(device)
    y_MN = torch.empty(num_rows, num_outputs, dtype=out_dtype, device=device)
    if num_rows:
        num_hit = min(num_slots, num_rows)
        tiles = tiles or choose_tiles(rows.arithmetic, -(-num_rows // num_slots), num_outputs * num_hit)
        most_tiles = min(num_rows, num_rows // tiles.T + num_hit)
        product.launch(rows, weights, y_MN, tiles, most_tiles, counts_e)
    return y_MN


@dataclass(frozen=True, slots=True)
class Case:
    M: int
    e: int
    N: int
    K: int


CASES = [Case(M=m, e=24, N=n, K=k) for m in (0, 8, 24, 384, 8192) for n, k in ((4096, 7168), (7168, 2048))]


def cost(case: Case) -> Cost:
    """Of rows spread over all slots: every slot's weights are read once, if there is a row for each."""
    num_slots = min(case.e, case.M)
    moved = num_slots * case.N * case.K + case.M * (case.K + 2 * case.N)
    return Cost(moved, 2 * case.M * case.N * case.K)
