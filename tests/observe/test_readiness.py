"""Stages add up to the whole, whatever order they come in; of ranks the slowest counts, part by part."""

from k2dist.messages import LoadSeconds, RankProgress
from k2dist.observe.readiness import StageClock


def test_stages_add_up() -> None:
    clock = StageClock(100.0)
    for stage, now_s in (("Ray", 100.0), ("placing", 107.0), ("placing", 107.5), ("loading", 108.0)):
        clock.enter(stage, now_s)
    ready = clock.end(120.0)
    assert [(stage.name, stage.wall_s) for stage in ready.stages] == [
        ("Ray", 7.0),
        ("placing", 1.0),
        ("loading", 12.0),
    ]
    assert ready.total_s == sum(stage.wall_s for stage in ready.stages)
    assert str(ready) == "ready in 20.0 s: Ray 7.0, placing 1.0, loading 12.0"


def test_a_stage_entered_again_goes_on() -> None:
    clock = StageClock(0.0)
    for stage, now_s in (("a", 0.0), ("b", 1.0), ("a", 3.0)):
        clock.enter(stage, now_s)
    assert {stage.name: stage.wall_s for stage in clock.end(10.0).stages} == {"a": 8.0, "b": 2.0}


def test_the_slowest_rank_of_each_part_is_told() -> None:
    def rank(find_s: float, read_s: float) -> RankProgress:
        seconds = LoadSeconds(find_s=find_s, read_s=read_s, lay_out_s=0.5, test_s=0.25)
        return RankProgress(seconds=seconds)

    clock = StageClock(0.0)
    clock.enter("loading", 0.0)
    ready = clock.end(9.0, [rank(1.0, 4.0), rank(2.0, 3.0), RankProgress()])
    assert ready.slowest == LoadSeconds(find_s=2.0, read_s=4.0, lay_out_s=0.5, test_s=0.25)
    assert str(ready).endswith("found 2.0, read 4.0, laid out 0.5, tested 0.2")
