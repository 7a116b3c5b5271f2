"""Many experts' linears at once: what each would give by itself, bit for bit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from k2kernels import StoredWeight, fp8_gemm, grouped_gemm
from torch import Tensor

if TYPE_CHECKING:
    from tests.kernels.conftest import RowsStandAlone


def test_each_row_meets_its_slots_weights() -> None:
    weights = [StoredWeight(torch.randn(24, 40)) for _ in range(5)]
    grouped = grouped_gemm.prepare_grouped([(weight,) for weight in weights], 24)
    counts = [3, 0, 17, 0, 1]
    x_MK = torch.randn(21, 40)
    y_MN = grouped_gemm.reference(x_MK, torch.tensor(counts), grouped, torch.float32)
    wanted = [
        fp8_gemm.reference(part, fp8_gemm.prepare([weight]), torch.float32)
        for part, weight in zip(x_MK.split(counts), weights, strict=True)
    ]
    assert torch.equal(y_MN, torch.cat(wanted))


def test_no_rows_and_no_slots() -> None:
    none = grouped_gemm.prepare_grouped([], 24)
    counts_e = torch.empty(0, dtype=torch.int64)
    assert grouped_gemm.reference(torch.empty(0, 40), counts_e, none, torch.bfloat16).shape == (0, 24)
    some = grouped_gemm.prepare_grouped([(StoredWeight(torch.randn(24, 40)),)], 24)
    assert grouped_gemm.reference(torch.empty(0, 40), torch.tensor([0]), some, torch.float32).shape == (0, 24)


def test_rows_behind_the_counts_are_neither_read_nor_computed() -> None:
    """And on a rank without slots that is all of them."""
    grouped = grouped_gemm.prepare_grouped([(StoredWeight(torch.randn(24, 40)),) for _ in range(3)], 24)
    counts_e, x_MK = torch.tensor([2, 0, 19]), torch.randn(30, 40)
    wanted = grouped_gemm.reference(x_MK[:21], counts_e, grouped, torch.float32)
    x_MK[21:] = torch.nan
    y_MN = grouped_gemm.reference(x_MK, counts_e, grouped, torch.float32)
    assert torch.equal(y_MN[:21], wanted)
    assert y_MN[21:].isnan().all(), "whoever reads them is found"
    none = grouped_gemm.prepare_grouped([], 24)
    assert grouped_gemm.reference(x_MK, counts_e[:0], none, torch.bfloat16).isnan().all()


def test_rows_stand_alone(rows_stand_alone: RowsStandAlone) -> None:
    """Which rows share a slot changes from call to call, and with it their place in a tile."""
    grouped = grouped_gemm.prepare_grouped([(StoredWeight(torch.randn(24, 40)),) for _ in range(3)], 24)
    x_MK, slot_M = torch.randn(60, 40), torch.randint(0, 3, (60,))

    def op(row_M: Tensor) -> Tensor:
        order = slot_M[row_M].argsort(stable=True)
        counts_e = slot_M[row_M].bincount(minlength=3)
        y_MN = torch.empty(len(row_M), 24)
        y_MN[order] = grouped_gemm.reference(x_MK[row_M][order], counts_e, grouped, torch.float32)
        return y_MN

    rows_stand_alone(op, 60)
