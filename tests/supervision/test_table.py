"""A world comes up in order, goes down in order, and whatever dies, nothing is left."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k2dist.config.cluster import DeadlinesConfig
from k2dist.ids import Generation, WorldRank
from k2dist.supervision.advance import advance
from k2dist.supervision.events import (
    Action,
    Beat,
    Begin,
    CloseService,
    CreatePlacement,
    Died,
    Drained,
    DrainService,
    Event,
    Failed,
    Joined,
    JoinGeneration,
    KillRank,
    Loaded,
    LoadRank,
    OpenService,
    Placed,
    PlacementFailed,
    Removed,
    RemovePlacement,
    Report,
    RunRank,
    Started,
    StartRank,
    Stopped,
    StopRank,
    StopRequested,
    Tick,
)
from k2dist.supervision.table import Phase, first_table

DEADLINES = DeadlinesConfig(start_s=60, load_s=100, join_s=30, record_s=10, drain_s=20, stop_s=10, lease_s=5)
FIRST = Generation(1)


class World:
    """The table under test, its clock and all that it asked for."""

    def __init__(self, num_ranks: int = 2, *, has_lease: bool = False) -> None:
        self.now_s = 0.0
        self.table = first_table(num_ranks, DEADLINES, has_lease=has_lease, now_s=0.0)
        self.actions: list[Action] = []

    def tell(self, event: Event, after_s: float = 0.0) -> list[Action]:
        """Only what is to be done; reports go to `actions` as well."""
        self.now_s += after_s
        self.table, actions = advance(self.table, event, self.now_s)
        self.table.check()
        self.actions += actions
        return [action for action in actions if not isinstance(action, Report)]

    def reach(self, phase: Phase) -> "World":
        """Let all go well until `phase`."""
        ranks = [WorldRank(rank) for rank in range(len(self.table.ranks))]
        path: list[tuple[Phase, list[Event]]] = [
            (Phase.PLACING, [Begin()]),
            (Phase.BUILDING, [Placed(), *(Started(rank, 1) for rank in ranks)]),
            (Phase.JOINING, [Loaded(rank, 1) for rank in ranks]),
            (Phase.RUNNING, [Joined(rank, 1, FIRST) for rank in ranks]),
            (Phase.DRAINING, [StopRequested("asked")]),
            (Phase.STOPPING, [Drained()]),
            (Phase.REMOVING, [Stopped(rank, 1) for rank in ranks]),
            (Phase.STOPPED, [Removed()]),
        ]
        for reached, events in path:
            if reached <= phase:
                for event in events:
                    self.tell(event)
        assert self.table.phase is phase
        return self


def rank(number: int) -> WorldRank:
    return WorldRank(number)


def test_a_world_comes_up_and_goes_down_in_order() -> None:
    world = World(2)
    assert world.tell(Begin()) == [CreatePlacement()]
    assert world.tell(Placed()) == [StartRank(rank(0), 1), StartRank(rank(1), 1)]
    assert world.tell(Started(rank(1), 1)) == [LoadRank(rank(1), 1)]
    assert world.tell(Loaded(rank(1), 1)) == [], "one is fast: it does not wait to load, and waits to join"
    assert world.tell(Started(rank(0), 1)) == [LoadRank(rank(0), 1)]
    assert world.tell(Loaded(rank(0), 1)) == [
        JoinGeneration(rank(0), 1, FIRST),
        JoinGeneration(rank(1), 1, FIRST),
    ]
    assert world.tell(Joined(rank(0), 1, FIRST)) == []
    assert world.tell(Joined(rank(1), 1, FIRST)) == [RunRank(rank(0), 1), RunRank(rank(1), 1), OpenService()]
    assert world.tell(StopRequested("asked")) == [DrainService(20.0)]
    assert world.tell(StopRequested("again")) == []
    assert world.tell(Drained()) == [CloseService(), StopRank(rank(0), 1), StopRank(rank(1), 1)]
    assert world.tell(Stopped(rank(0), 1)) == []
    assert world.tell(Stopped(rank(1), 1)) == [KillRank(rank(0), 1), KillRank(rank(1), 1), RemovePlacement()]
    assert world.tell(Removed()) == []
    assert (world.table.phase, world.table.reason, world.table.is_failure) == (Phase.STOPPED, "asked", False)
    assert world.table.next_deadline() is None


@pytest.mark.parametrize("phase", [Phase.BUILDING, Phase.JOINING, Phase.RUNNING, Phase.DRAINING])
@pytest.mark.parametrize("kind", [Died, Failed])
def test_a_lost_rank_ends_the_world_with_its_error(phase: Phase, kind: type[Died] | type[Failed]) -> None:
    world = World(3).reach(phase)
    actions = world.tell(kind(rank(1), 1, "no shard 7"))
    killed = [action.world_rank for action in actions if isinstance(action, KillRank)]
    assert killed == ([0, 2] if kind is Died else [0, 1, 2]), "a process that failed may still live"
    assert isinstance(actions[0], CloseService)
    assert actions[-1] == RemovePlacement()
    doing = {Phase.BUILDING: "loading"}.get(phase, phase.name.lower())
    verb = "died" if kind is Died else "failed"
    assert world.table.reason == f"world rank 1 {verb} while {doing}: no shard 7"
    assert world.table.is_failure
    assert [action for action in world.actions if isinstance(action, Report) and action.is_error]
    world.tell(Removed())
    assert world.table.phase is Phase.STOPPED


def test_the_first_failure_is_the_reason() -> None:
    world = World(2).reach(Phase.BUILDING)
    world.tell(Failed(rank(0), 1, "CheckpointError: missing"))
    world.tell(Died(rank(1), 1, "killed"))
    world.tell(StopRequested("asked"))
    assert world.table.reason == "world rank 0 failed while loading: CheckpointError: missing"


def test_a_placement_that_cannot_be_ends_before_anything_started() -> None:
    world = World(2).reach(Phase.PLACING)
    assert world.tell(PlacementFailed("4 CPUs wanted, 2 there")) == [
        CloseService(),
        RemovePlacement(),
    ]
    assert world.table.is_failure


def test_a_rank_that_dies_while_stopping_is_one_less_to_wait_for() -> None:
    world = World(2).reach(Phase.STOPPING)
    assert world.tell(Died(rank(0), 1, "killed")) == []
    assert world.tell(Stopped(rank(1), 1)) == [KillRank(rank(1), 1), RemovePlacement()]
    assert not world.table.is_failure


def test_a_rank_that_leaves_unasked_is_a_failure() -> None:
    world = World(2).reach(Phase.RUNNING)
    world.tell(Stopped(rank(0), 1))
    assert world.table.reason == "world rank 0 left its step loop unasked"


@pytest.mark.parametrize("phase", [Phase.NEW, Phase.PLACING, Phase.BUILDING, Phase.JOINING])
def test_before_it_runs_a_world_stops_without_draining(phase: Phase) -> None:
    world = World(2).reach(phase)
    actions = world.tell(StopRequested("asked"))
    assert not [action for action in actions if isinstance(action, DrainService | StopRank)]
    assert actions[-1] == RemovePlacement()
    assert not world.table.is_failure


@pytest.mark.parametrize(
    ("phase", "name", "reason"),
    [
        (Phase.PLACING, "start_s", "the placement group was not ready within start_s=60"),
        (Phase.BUILDING, "load_s", "world ranks 0, 1 not done loading within load_s=100"),
        (Phase.JOINING, "joined_s", "world ranks 0, 1 did not join within join_s + record_s=40"),
    ],
)
def test_every_wait_on_the_way_up_has_a_deadline(phase: Phase, name: str, reason: str) -> None:
    world = World(2).reach(phase)
    deadline = world.table.next_deadline()
    assert deadline == (name, getattr(DEADLINES, name))
    assert world.tell(Tick(), after_s=deadline[1] - 0.001) == []
    assert world.tell(Tick(), after_s=0.001)[-1] == RemovePlacement()
    assert (world.table.reason, world.table.is_failure) == (reason, True)


def test_a_deadline_names_only_those_that_are_late() -> None:
    world = World(3).reach(Phase.PLACING)
    world.tell(Placed())
    world.tell(Started(rank(0), 1), after_s=1.0)
    world.tell(Started(rank(2), 1), after_s=1.0)
    world.tell(Tick(), after_s=58.0)
    assert world.table.reason == "world rank 1 not done starting within start_s=60"


def test_what_does_not_drain_stop_or_go_in_time_is_cut() -> None:
    world = World(2).reach(Phase.DRAINING)
    assert world.tell(Tick(), after_s=20.0) == [
        CloseService(),
        StopRank(rank(0), 1),
        StopRank(rank(1), 1),
    ]
    world.tell(Stopped(rank(1), 1), after_s=1.0)
    assert world.tell(Tick(), after_s=9.0) == [KillRank(rank(0), 1), KillRank(rank(1), 1), RemovePlacement()]
    world.tell(Tick(), after_s=10.0)
    assert (world.table.phase, world.table.is_failure) == (Phase.STOPPED, False)


def test_a_driver_that_beats_keeps_its_world_and_one_that_does_not_loses_it() -> None:
    world = World(2, has_lease=True).reach(Phase.RUNNING)
    for _ in range(10):
        assert world.tell(Beat(), after_s=4.9) == []
    assert world.table.next_deadline() == ("lease_s", world.now_s + 5)
    (drain,) = world.tell(Beat(), after_s=5.0)
    assert drain == DrainService(world.now_s + 20)
    assert world.table.reason == "the driver's lease is over: no beat within lease_s=5"
    world.tell(Beat(), after_s=1.0)
    assert world.table.phase is Phase.DRAINING, "a beat does not revive"


def test_without_a_lease_time_does_not_matter() -> None:
    world = World(2).reach(Phase.RUNNING)
    assert world.table.next_deadline() is None
    assert world.tell(Tick(), after_s=1e9) == []


def test_a_lease_that_ends_while_loading_stops_at_once() -> None:
    world = World(2, has_lease=True).reach(Phase.BUILDING)
    actions = world.tell(Tick(), after_s=5.0)
    assert [type(action) for action in actions] == [CloseService, KillRank, KillRank, RemovePlacement]


def test_news_of_another_incarnation_or_generation_is_late_news() -> None:
    world = World(2).reach(Phase.JOINING)
    before = world.table
    for late in (
        Died(rank(0), 0, "old"),
        Loaded(rank(0), 1),
        Joined(rank(0), 1, Generation(0)),
        Started(rank(1), 2),
    ):
        assert world.tell(late) == []
    assert world.table == before


def some_event(num_ranks: int) -> st.SearchStrategy[Event]:
    ranks = st.integers(0, num_ranks - 1).map(WorldRank)
    incarnations = st.sampled_from([1, 1, 1, 0])
    return st.one_of(
        st.sampled_from([Begin(), Placed(), Beat(), Drained(), Removed(), Tick()]),
        st.builds(Started, ranks, incarnations),
        st.builds(Loaded, ranks, incarnations),
        st.builds(Joined, ranks, incarnations, st.sampled_from([FIRST, FIRST, Generation(0)])),
        st.builds(Stopped, ranks, incarnations),
        st.sampled_from([StopRequested("asked"), PlacementFailed("no room"), Tick(), Tick()]),
        st.builds(Died, ranks, incarnations, st.just("gone")),
        st.builds(Failed, ranks, incarnations, st.just("wrong")),
    )


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    st.integers(1, 3),
    st.booleans(),
    st.sampled_from(list(Phase)),
    st.lists(st.tuples(some_event(3), st.sampled_from([0.0, 0.0, 1.0, 4.0, 12.0, 70.0])), max_size=25),
)
def test_whatever_happens_every_process_ends_and_the_place_is_given_back(
    num_ranks: int, has_lease: bool, phase: Phase, news: list[tuple[Event, float]]
) -> None:
    world = World(num_ranks, has_lease=has_lease).reach(phase)
    for event, after_s in news:
        if getattr(event, "world_rank", 0) < num_ranks:
            was = world.table.phase
            world.tell(event, after_s)
            assert world.table.phase >= was, "a world never goes back"
    world.tell(StopRequested("over"))
    for _ in range(10):  # nobody answers any more
        deadline = world.table.next_deadline()
        if deadline is not None:
            world.tell(Tick(), max(deadline[1] - world.now_s, 0.0))
    assert world.table.phase is Phase.STOPPED
    started = {(a.world_rank, a.incarnation) for a in world.actions if isinstance(a, StartRank)}
    killed = [(a.world_rank, a.incarnation) for a in world.actions if isinstance(a, KillRank)]
    dead = {(e.world_rank, e.incarnation) for e, _ in news if isinstance(e, Died)}
    assert len(killed) == len(set(killed)), "killed twice"
    assert started <= set(killed) | dead
    assert sum(isinstance(action, RemovePlacement) for action in world.actions) == 1
    assert sum(isinstance(action, CloseService) for action in world.actions) == 1
    assert sum(isinstance(action, OpenService) for action in world.actions) <= 1
