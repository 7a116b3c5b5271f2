"""The property that every kernel keeps, a row's bits depend on that row alone; and where Triton kernels run.

Without a CUDA device Triton's interpreter runs them here. It must be chosen before Triton is first imported,
whose own functions are built then, and before anything else in the suite imports it: at collection. It is
chosen for this process and not for its children. The interpreter does not model how a tensor core adds: that
two tiles give one row the same bits is shown for the order along K here, and on a device by the same tests,
`-m gpu`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

RowsStandAlone = Callable[[Callable[[Tensor], Tensor], int], None]

IS_INTERPRETED = not torch.cuda.is_available() and find_spec("triton") is not None
if IS_INTERPRETED:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        import triton.language  # noqa: F401


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """Where to launch Triton kernels. What they allocate there is NaN until they write it."""
    if request.param == "cuda":
        assert torch.cuda.is_available(), "tests marked gpu need a CUDA device"
    elif not IS_INTERPRETED:
        pytest.skip("the interpreter is for machines with Triton and without a CUDA device")
    else:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(torch, "empty", _poisoned_empty)
    with torch.device(request.param):
        yield torch.device(request.param)


_torch_empty = torch.empty


def _poisoned_empty(*args: Any, **kwargs: Any) -> Tensor:
    """Every byte 255: NaN in float32, bfloat16 and e4m3, and -1 in integers."""
    x: Tensor = _torch_empty(*args, **kwargs)
    if x.numel():
        x.view(torch.uint8).fill_(255)
    return x


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


@pytest.fixture
def rows_are_alone() -> RowsStandAlone:
    """As `rows_stand_alone`, with few calls: for what takes long."""

    def check(op: Callable[[Tensor], Tensor], num_rows: int) -> None:
        whole = bits(op(torch.arange(num_rows)))
        assert len(op(torch.arange(0))) == 0
        for size in (num_rows, num_rows - 1, 2, 1):
            row_M = torch.randperm(num_rows)[:size]
            assert torch.equal(bits(op(row_M)), whole[row_M]), f"{size} rows"

    return check
