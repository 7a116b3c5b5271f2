"""Percentiles of waits, in milliseconds."""

import pytest

from k2dist.bench.waits import Waits


def test_percentiles_are_of_the_ordered_waits() -> None:
    waits = Waits.of([0.001 * i for i in range(100, 0, -1)])
    assert (waits.count, waits.max_ms) == (100, pytest.approx(100.0))
    assert waits.p50_ms == pytest.approx(51.0)
    assert waits.p95_ms == pytest.approx(96.0)


def test_one_wait_is_all_of_them() -> None:
    assert Waits.of([0.002]) == Waits(count=1, p50_ms=2.0, p95_ms=2.0, max_ms=2.0)
