"""The table of predicted over published is what the planner says now, and explains what is far off."""

from __future__ import annotations

from pathlib import Path

import pytest

import k2dist.planner
from k2dist.config import Architecture
from tests.planner.published import ROWS, Prediction, predictions, table

TEXT = (Path(k2dist.planner.__file__).parent / "PUBLISHED.md").read_text()


@pytest.fixture(scope="module")
def found(k2: Architecture) -> tuple[Prediction, ...]:
    return predictions(k2)


def test_the_table_is_recomputed(found: tuple[Prediction, ...]) -> None:
    assert "\n".join(table(found)) in TEXT


def test_every_ratio_far_from_one_is_explained(found: tuple[Prediction, ...]) -> None:
    explained = TEXT.split("## What is outside 0.5 to 2")[1].split("Inside the range")[0]
    for one in found:
        for ratio in (one.ratio, one.their_ratio):
            if not 0.5 <= ratio <= 2:
                assert one.row.number in explained
                assert f"{ratio:.2f}" in explained


def test_decode_as_published_systems_do_it_is_met_within_a_tenth(found: tuple[Prediction, ...]) -> None:
    """The two rows whose batch, layout and context are all published: nothing in them is a guess of ours."""
    ratios = {one.row.number: one.their_ratio for one in found}
    assert 0.9 < ratios["1 D"] < 1.1
    assert 0.9 < ratios["9 D"] < 1.1


def test_each_row_that_was_asked_for_is_there() -> None:
    assert {row.number.split()[0] for row in ROWS} == {"1", "9", "13", "21"}
