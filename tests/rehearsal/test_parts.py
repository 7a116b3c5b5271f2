"""Each moment of a step is of one part; what peers cost is of none."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from k2dist.planner.work import Part
from k2dist.rehearsal.parts import Stopwatch


class FakeClock:
    """Seconds as told."""

    name = "fake"

    def __init__(self) -> None:
        self.now_s = 0.0

    def mark(self) -> object:
        return self.now_s

    def elapsed_s(self, marks: Sequence[object]) -> list[float]:
        times = [float(str(mark)) for mark in marks]
        return [times[i + 1] - times[i] for i in range(len(times) - 1)]


def test_parts_add_up_to_the_step_and_peers_are_left_out() -> None:
    clock = FakeClock()
    watch = Stopwatch(clock)
    with watch.aside():  # before the first step: nobody counts
        clock.now_s += 100
    watch.start()
    clock.now_s += 1
    watch.cut(Part.HOST)
    clock.now_s += 2
    with watch.aside():
        clock.now_s += 40
    clock.now_s += 3
    with watch.aside():
        clock.now_s += 50
    watch.cut(Part.DISPATCH)
    clock.now_s += 6
    watch.cut(Part.EXPERTS)
    clock.now_s += 7
    watch.cut(Part.DISPATCH)
    times = watch.times_s()
    assert times.parts[Part.HOST] == 1
    assert times.parts[Part.DISPATCH] == 2 + 3 + 7
    assert times.parts[Part.EXPERTS] == 6
    assert times.aside_s == 90
    assert times.step_s == 19
    watch.start()
    watch.cut(Part.HOST)
    assert watch.times_s().step_s == 0, "the step before is forgotten"


def test_no_part_ends_while_peers_are_made_up() -> None:
    watch = Stopwatch(FakeClock())
    watch.start()
    with watch.aside(), pytest.raises(AssertionError, match="peers"):
        watch.cut(Part.HEAD)
