"""The property that every kernel keeps: a row's bits depend on that row alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

RowsStandAlone = Callable[[Callable[[Tensor], Tensor], int], None]


def bits(x: Tensor) -> Tensor:
    """As bytes: NaN equals itself, and -0 is not 0."""
    return x.contiguous().view(torch.uint8)


@pytest.fixture
def rows_stand_alone() -> RowsStandAlone:
    """Check `op(row_M)`, which computes the rows numbered `row_M` in that order, for `num_rows` rows."""

    def check(op: Callable[[Tensor], Tensor], num_rows: int) -> None:
        whole = bits(op(torch.arange(num_rows)))
        assert len(op(torch.arange(0))) == 0
        for _ in range(4):
            row_M = torch.randperm(num_rows)
            assert torch.equal(bits(op(row_M)), whole[row_M]), "shuffled"
        for size in (1, 2, 3, 15, 16, 17):
            for row_M in torch.randperm(num_rows).split(size)[:6]:
                assert torch.equal(bits(op(row_M)), whole[row_M]), f"{size} rows"

    return check


@pytest.fixture
def with_threads() -> Iterator[Callable[[int], None]]:
    """Call it to have torch use so many threads until the test's end."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
