"""A lane that has work and makes no step is unwell; one that idles or steps is left alone."""

from __future__ import annotations

from k2dist.ids import LaneId
from k2dist.messages import LaneLoad
from k2dist.observe import ClusterState, HealthJudge, LaneView, RankView, RequestBook, WorldState


def lane(number: int, num_steps: int, *, num_running: int = 1) -> LaneView:
    load = LaneLoad(
        lane=LaneId(number),
        num_running=num_running,
        num_waiting=0,
        num_pages=1,
        num_pages_free=0,
        num_steps=num_steps,
    )
    return LaneView(lane=number, load=load)


def state(*lanes: LaneView, is_draining: bool = False, world: WorldState | None = None) -> ClusterState:
    return ClusterState(
        cluster="a",
        model="demo",
        is_draining=is_draining,
        num_queued=0,
        num_outputs=0,
        lanes=lanes,
        requests=RequestBook().facts(),
        world=world,
    )


def test_a_lane_that_stands_still_with_work_is_unwell() -> None:
    judge = HealthJudge(stall_s=10)
    for now_s, num_steps, unwell in (
        (0.0, 5, ""),
        (9.9, 5, ""),
        (10.0, 5, "lane 0 has work and made no step for 10 s"),
        (11.0, 6, ""),
        (20.0, 6, ""),
    ):
        health = judge.judge(state(lane(0, num_steps)), now_s)
        assert (health.unwell, health.not_ready) == (unwell, unwell)


def test_an_idle_lane_needs_no_steps() -> None:
    judge = HealthJudge(stall_s=10)
    for now_s in (0.0, 100.0, 200.0):
        assert not judge.judge(state(lane(0, 5, num_running=0)), now_s).unwell
    assert not judge.judge(state(lane(0, 5)), 300.0).unwell, "its work has just come"


def test_each_lane_counts_for_itself_and_a_lost_one_is_forgotten() -> None:
    judge = HealthJudge(stall_s=10)
    judge.judge(state(lane(0, 1), lane(1, 1)), 0.0)
    unwell = judge.judge(state(lane(0, 2), lane(1, 1)), 10.0).unwell
    assert unwell == "lane 1 has work and made no step for 10 s"
    assert not judge.judge(state(lane(0, 3)), 20.0).unwell
    assert not judge.judge(state(lane(0, 4), lane(1, 1)), 30.0).unwell


def test_a_silent_rank_is_to_blame_and_one_that_loads_makes_nobody_unwell() -> None:
    ranks = tuple(
        RankView(world_rank=number, lane=0, tp_rank=number, state=name, silent_s=silent_s)
        for number, name, silent_s in ((0, "joined", 30.0), (1, "loading", 0.0))
    )
    world = WorldState(generation=1, phase="building", ranks=ranks)
    health = HealthJudge(stall_s=10).judge(state(lane(0, 1), world=world), 0.0)
    assert (health.late, health.unwell) == ((0,), "rank 0 is late: no answer for 30 s")
    assert health.not_ready == "loading: rank 1; rank 0 is late: no answer for 30 s"


def test_draining_is_no_illness_and_a_cluster_without_lanes_is_ill() -> None:
    health = HealthJudge(stall_s=10).judge(state(lane(0, 1), is_draining=True), 0.0)
    assert (health.not_ready, health.unwell) == ("draining", "")
    health = HealthJudge(stall_s=10).judge(state(), 0.0)
    assert (health.not_ready, health.unwell) == ("no lane is left", "no lane is left")
