"""What `Batch.check` holds a batch to."""

from __future__ import annotations

import dataclasses
import random
from typing import TYPE_CHECKING

import pytest
import torch

from k2dist.model.batch import Batch

if TYPE_CHECKING:
    from tests.model.conftest import Rig


@pytest.fixture
def batch(rig: Rig) -> Batch:
    """Rows 0-4 of a prompt, rows 5 and 6 generated."""
    sequence = rig.sequence(rig.architecture(), 40, 20, 0, random.Random(0))
    other = rig.sequence(rig.architecture(), 5, 5, 10, random.Random(0))
    return rig.batch([rig.grant(other, 0, 5), rig.grant(sequence, 30, 32)], 2)


def test_an_idle_lanes_batch_is_whole() -> None:
    empty = Batch.empty(4)
    empty.check()
    assert (empty.num_rows, empty.shares) == (0, (0, 0, 0, 0))


@pytest.mark.parametrize(
    "changes",
    [
        {"decode_row_R": torch.tensor([5, 5])},
        {"decode_row_R": torch.tensor([4, 5])},
        {"shares": (4, 4)},
        {"write_T": torch.zeros(7, dtype=torch.int64)},
        {"decode_length_R": torch.tensor([30, 31])},
        {"position_T": torch.tensor([0, 1, 2, 3, 5, 30, 31])},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_wrong_batch_is_noticed(batch: Batch, changes: dict[str, object]) -> None:
    batch.check()
    with pytest.raises(AssertionError):
        dataclasses.replace(batch, **changes).check()  # type: ignore[arg-type]
