"""A pace tells the rate of late, and the time left."""

import pytest

from k2dist.observe.pace import Pace


def test_nothing_is_told_before_time_has_passed() -> None:
    pace = Pace()
    assert (pace.per_s, pace.eta_s(10)) == (None, None)
    pace.note(5, 100.0)
    assert (pace.per_s, pace.eta_s(10)) == (None, None)


def test_a_steady_count_arrives_when_it_says() -> None:
    pace = Pace()
    for second in range(5):
        pace.note(20 * second, 100.0 + second)
    assert pace.per_s == 20.0
    assert pace.eta_s(180) == pytest.approx(5.0)


def test_a_count_that_slows_down_is_judged_by_its_late_pace() -> None:
    pace = Pace(window_s=10.0)
    for second in range(100):
        pace.note(1000 * second, float(second))
    for second in range(100, 112):
        pace.note(99_000 + second - 99, float(second))
    assert pace.per_s == pytest.approx(1.0)


def test_a_count_that_stands_still_has_no_end_in_sight() -> None:
    pace = Pace()
    pace.note(5, 0.0)
    pace.note(5, 9.0)
    assert (pace.per_s, pace.eta_s(10)) == (0.0, None)
    assert pace.eta_s(5) == 0.0


def test_reports_between_which_much_time_passes_still_give_a_rate() -> None:
    pace = Pace(window_s=1.0)
    pace.note(0, 0.0)
    pace.note(60, 60.0)
    pace.note(180, 120.0)
    assert pace.per_s == 2.0
