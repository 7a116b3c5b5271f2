"""A bad row ends its request, a run of nothing else ends the rank; all tp ranks judge alike."""

import pytest
import torch
from torch import Tensor

from k2dist.engine.guard import RowGuard
from k2dist.errors import FaultyRankError
from k2dist.ids import Generation, RequestId, SeqId
from k2dist.messages import NewSequence, Sampling, StepPlan

GOOD, BAD = 1.0, float("nan")


def plan(*new: tuple[int, str], released: tuple[int, ...] = ()) -> StepPlan:
    return StepPlan(
        generation=Generation(0),
        step=0,
        released=tuple(SeqId(seq_id) for seq_id in released),
        new=tuple(
            NewSequence(
                seq_id=SeqId(seq_id),
                request_id=RequestId(request_id),
                output_index=0,
                prompt=(1,),
                sampling=Sampling(),
            )
            for seq_id, request_id in new
        ),
    )


def rows(*values: float) -> Tensor:
    x_SD = torch.ones(len(values), 8)
    x_SD[:, 5] = torch.tensor(values)
    return x_SD


@pytest.fixture
def guard() -> RowGuard:
    guard = RowGuard()
    guard.apply(plan((0, "a"), (1, "b"), (2, "a"), (3, "c")))
    return guard


def check(guard: RowGuard, **values: float) -> dict[str, str]:
    """`s0=GOOD`: the row of sequence 0."""
    owners = [SeqId(int(name[1:])) for name in values]
    x_SD, faults = guard.check(rows(*values.values()), owners)
    assert torch.isfinite(x_SD).all(), "what goes on is finite"
    return dict(faults)


def test_good_rows_pass_untouched(guard: RowGuard) -> None:
    x_SD = rows(GOOD, 3.0)
    assert guard.check(x_SD, [SeqId(0), SeqId(1)]) == (x_SD, {})
    assert guard.check(x_SD[:0], [])[1] == {}


@pytest.mark.parametrize("value", [BAD, float("inf"), float("-inf")])
def test_a_bad_row_names_its_request_and_the_fault(guard: RowGuard, value: float) -> None:
    faults = check(guard, s0=GOOD, s1=value, s3=GOOD)
    assert list(faults) == ["b"]
    assert f"{int(value != value)} NaN and {int(value == value)} infinities of 8" in faults["b"]


def test_opposite_infinities_do_not_cancel(guard: RowGuard) -> None:
    x_SD = rows(GOOD, GOOD)
    x_SD[1, 2:4] = torch.tensor([float("inf"), float("-inf")])
    assert list(guard.check(x_SD, [SeqId(0), SeqId(1)])[1]) == ["b"]


def test_two_requests_without_a_good_row_end_the_rank(guard: RowGuard) -> None:
    with pytest.raises(FaultyRankError, match="all 2 rows"):
        check(guard, s0=BAD, s1=BAD)


def test_one_request_alone_is_not_the_ranks_fault(guard: RowGuard) -> None:
    assert list(check(guard, s0=BAD, s2=BAD)) == ["a"], "two outputs of one request"
    assert list(check(guard, s0=BAD)) == ["a"]
    with pytest.raises(FaultyRankError, match="2 requests"):
        check(guard, s3=BAD)


def test_a_good_row_clears_the_rank(guard: RowGuard) -> None:
    check(guard, s0=BAD)
    check(guard, s1=GOOD)
    assert list(check(guard, s3=BAD)) == ["c"]


def test_numbers_of_sequences_are_learned_and_forgotten(guard: RowGuard) -> None:
    guard.apply(plan((7, "d"), released=(1,)))
    assert list(check(guard, s7=BAD, s0=GOOD)) == ["d"]
    with pytest.raises(KeyError):
        check(guard, s1=BAD, s0=GOOD)
