"""A bad row ends its request, a run of nothing else ends the rank; all tp ranks judge alike."""

import pytest
import torch
from torch import Tensor

from k2dist.engine.guard import RowGuard
from k2dist.errors import FaultyRankError
from k2dist.ids import RequestId

GOOD, BAD = 1.0, float("nan")


def rows(*values: float) -> Tensor:
    x_SD = torch.ones(len(values), 8)
    x_SD[:, 5] = torch.tensor(values)
    return x_SD


@pytest.fixture
def guard() -> RowGuard:
    return RowGuard()


def check(guard: RowGuard, *rows_of: tuple[str, float]) -> dict[str, str]:
    """What is wrong with whom, of rows that are given with their requests."""
    owners = [RequestId(name) for name, _ in rows_of]
    x_SD, faults = guard.check(rows(*(value for _, value in rows_of)), owners)
    assert torch.isfinite(x_SD).all(), "what goes on is finite"
    return dict(faults.read())


def test_good_rows_pass_untouched(guard: RowGuard) -> None:
    x_SD = rows(GOOD, 3.0)
    passed_SD, faults = guard.check(x_SD, [RequestId("a"), RequestId("b")])
    assert torch.equal(passed_SD, x_SD)
    assert faults.read() == {}
    assert guard.check(x_SD[:0], [])[1].read() == {}


@pytest.mark.parametrize("value", [BAD, float("inf"), float("-inf")])
def test_a_bad_row_names_its_request_and_the_fault(guard: RowGuard, value: float) -> None:
    faults = check(guard, ("a", GOOD), ("b", value), ("c", GOOD))
    assert list(faults) == ["b"]
    assert f"{int(value != value)} NaN and {int(value == value)} infinities of 8" in faults["b"]


def test_opposite_infinities_do_not_cancel(guard: RowGuard) -> None:
    x_SD = rows(GOOD, GOOD)
    x_SD[1, 2:4] = torch.tensor([float("inf"), float("-inf")])
    assert list(guard.check(x_SD, [RequestId("a"), RequestId("b")])[1].read()) == ["b"]


def test_two_requests_without_a_good_row_end_the_rank(guard: RowGuard) -> None:
    with pytest.raises(FaultyRankError, match="all 2 rows"):
        check(guard, ("a", BAD), ("b", BAD))


def test_one_request_alone_is_not_the_ranks_fault(guard: RowGuard) -> None:
    assert list(check(guard, ("a", BAD), ("a", BAD))) == ["a"], "two outputs of one request"
    assert list(check(guard, ("a", BAD))) == ["a"]
    with pytest.raises(FaultyRankError, match="2 requests"):
        check(guard, ("c", BAD))


def test_a_good_row_clears_the_rank(guard: RowGuard) -> None:
    check(guard, ("a", BAD))
    check(guard, ("b", GOOD))
    assert list(check(guard, ("c", BAD))) == ["c"]
