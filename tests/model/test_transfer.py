"""What a step has to tell is read once, in order, and nothing behind a flag is looked at."""

from __future__ import annotations

import pytest
import torch

from k2dist.model.transfer import Unread, all_of, both, indices, known, to_device

CPU = torch.device("cpu")


def ints(*values: int) -> Unread[list[int]]:
    return Unread((torch.tensor(values),), lambda found: found[0].tolist())


def flags(*values: bool) -> Unread[list[int]]:
    return Unread((torch.tensor(values),), lambda found: found[0].tolist())


def test_many_are_read_as_one() -> None:
    unread = both(all_of([ints(3, 4), known([9]), flags(True, False)]), ints().map(len))
    assert unread.read() == ([[3, 4], [9], [1, 0]], 0)
    assert len(unread.tensors) == 3


def test_on_the_cpu_everything_is_there() -> None:
    """And nobody has to settle."""
    settled: list[str] = []
    x_N = torch.tensor([1.5, -2.0], dtype=torch.float64)
    assert Unread((x_N,), lambda found: found[0].tolist()).read(lambda: settled.append("cpu")) == [1.5, -2.0]
    assert settled == []


def test_nothing_is_looked_at_where_a_flag_is_set() -> None:
    def fail(found: object) -> int:
        raise ZeroDivisionError("what a flag says means nothing")

    unread = Unread((torch.tensor([7]),), fail)
    assert unread.unless(torch.tensor(True)).read() is None
    with pytest.raises(ZeroDivisionError):
        unread.unless(torch.tensor(False)).read()


def test_small_tensors_are_where_they_are_asked_for() -> None:
    assert indices([], CPU).dtype == torch.int64
    assert indices([2, 0], torch.device("meta")).device.type == "meta"
    x_N = torch.ones(2)
    assert to_device(x_N, CPU) is x_N
