"""A lane that has work and makes no step is found; one that idles or steps is left alone."""

from __future__ import annotations

from k2dist.observe.progress import LaneWork, Progress, Stall


def test_a_lane_that_stands_still_with_work_is_stalled() -> None:
    progress = Progress(stall_s=10)
    assert progress.look([LaneWork(0, 5, True)], 0.0) == ()
    assert progress.look([LaneWork(0, 5, True)], 9.9) == ()
    assert progress.look([LaneWork(0, 5, True)], 10.0) == (Stall(0, 10.0),)
    assert progress.look([LaneWork(0, 6, True)], 11.0) == (), "it goes on"
    assert progress.look([LaneWork(0, 6, True)], 20.0) == ()


def test_an_idle_lane_needs_no_steps() -> None:
    progress = Progress(stall_s=10)
    for now_s in (0.0, 100.0, 200.0):
        assert progress.look([LaneWork(0, 5, False)], now_s) == ()
    assert progress.look([LaneWork(0, 5, True)], 300.0) == (), "its work has just come"


def test_each_lane_counts_for_itself_and_a_lost_one_is_forgotten() -> None:
    progress = Progress(stall_s=10)
    progress.look([LaneWork(0, 1, True), LaneWork(1, 1, True)], 0.0)
    assert progress.look([LaneWork(0, 2, True), LaneWork(1, 1, True)], 10.0) == (Stall(1, 10.0),)
    assert progress.look([LaneWork(0, 3, True)], 20.0) == ()
    assert progress.look([LaneWork(0, 4, True), LaneWork(1, 1, True)], 30.0) == ()
