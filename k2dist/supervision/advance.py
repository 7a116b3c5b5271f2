"""How the table changes: `advance(table, event, now_s) -> (table, actions)`.

A world goes through phases; within `building` each rank goes its own way, without waiting for the others.

    phase     event                       next phase   actions
    new       Begin                       placing      CreatePlacement
    placing   Placed                      building     StartRank (every rank)
    building  Started (a rank)            building     LoadRank (that rank)
    building  Loaded  (not yet all)       building     -
    building  Loaded  (the last)          joining      generation + 1; JoinGeneration (every rank)
    joining   Joined  (the last)          running      RunRank (every rank), OpenService
    running   StopRequested, lease over   draining     DrainService
    draining  Drained, drain_s over       stopping     CloseService, StopRank (every rank)
    stopping  Stopped or Died (the last)  removing     KillRank (every rank that is not dead), RemovePlacement
    stopping  stop_s over                 removing     the same
    removing  Removed, stop_s over        stopped      Report "world.stopped"

    before running: StopRequested, lease over, PlacementFailed
    up to draining: Failed, Died, Stopped unasked, start_s, load_s or joined_s over
                                          removing     CloseService, KillRank (every process), RemovePlacement

    rank:   placed -> starting -> loading -> ready -> joined -> stopped | dead

Replacing a dead rank will be a row of this table (fence, a new incarnation, the next generation); until then
a death ends the world, with the first failure as its `reason`. An event that does not fit the state is late
news, for instance of a process that has been killed, and changes nothing.

The lease: the driver beats; `lease_s` after its last beat the world ends in order. A beat does not revive.
"""

from __future__ import annotations

from dataclasses import replace

from k2dist.ids import Generation
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
)
from k2dist.supervision.table import Phase, RankRow, RankState, Table

Outcome = tuple[Table, tuple[Action, ...]]


def advance(table: Table, event: Event, now_s: float) -> Outcome:
    """The table after `event`, and what to do now, in order. Deadlines that have passed count first."""
    table, late = _pass_time(table, now_s)
    table, actions = _take(table, event, now_s)
    return table, late + actions


def _take(table: Table, event: Event, now_s: float) -> Outcome:
    match event:
        case Begin() if table.phase is Phase.NEW:
            return _enter(table, Phase.PLACING, now_s), (CreatePlacement(),)
        case Placed() if table.phase is Phase.PLACING:
            return _start(table, now_s)
        case PlacementFailed(error) if table.phase is Phase.PLACING:
            return _give_up(table, error, now_s)
        case Beat() if table.lease_until_s is not None and table.phase < Phase.DRAINING:
            return replace(table, lease_until_s=now_s + table.deadlines.lease_s), ()
        case StopRequested(reason):
            return _end(table, reason, now_s)
        case Drained() if table.phase is Phase.DRAINING:
            return _stop(table, now_s)
        case Removed() if table.phase is Phase.REMOVING:
            return _finish(table, now_s)
        case Started() | Loaded() | Joined() | Failed() | Died() | Stopped():
            row = table.ranks[event.world_rank]
            if row.incarnation == event.incarnation and row.has_process:
                return _take_rank(table, row, event, now_s)
    return table, ()


def _take_rank(
    table: Table, row: RankRow, event: Started | Loaded | Joined | Failed | Died | Stopped, now_s: float
) -> Outcome:
    """News of a process that the table counts as living."""
    match event:
        case Started() if row.state is RankState.STARTING:
            table = _move(table, row, RankState.LOADING, now_s)
            return table, (LoadRank(row.world_rank, row.incarnation),)
        case Loaded() if row.state is RankState.LOADING:
            return _join(_move(table, row, RankState.READY, now_s), row, now_s)
        case Joined(_, _, generation) if row.state is RankState.READY and generation == table.generation:
            return _run(_move(table, row, RankState.JOINED, now_s), now_s)
        case Stopped() if table.phase is Phase.STOPPING:
            return _remove_if_over(_move(table, row, RankState.STOPPED, now_s), now_s)
        case Stopped():
            return _give_up(table, f"world rank {row.world_rank} left its step loop unasked", now_s)
        case Died(_, _, error):
            doing = _doing(table, row)
            table = _move(table, row, RankState.DEAD, now_s)
            return _lose(table, f"world rank {row.world_rank} died while {doing}: {error}", now_s)
        case Failed(_, _, error):
            doing = _doing(table, row)
            table = _move(table, row, RankState.STOPPED, now_s)
            return _lose(table, f"world rank {row.world_rank} failed while {doing}: {error}", now_s)
    return table, ()


def _doing(table: Table, row: RankRow) -> str:
    if table.phase is Phase.BUILDING:
        return {RankState.STARTING: "starting", RankState.LOADING: "loading"}.get(
            row.state, "waiting for the others"
        )
    return table.phase.name.lower()


# -- the way up ----------------------------------------------------------------------------------------------


def _start(table: Table, now_s: float) -> Outcome:
    rows = tuple(
        replace(r, state=RankState.STARTING, incarnation=r.incarnation + 1, since_s=now_s)
        for r in table.ranks
    )
    table = replace(_enter(table, Phase.BUILDING, now_s), ranks=rows)
    return table, tuple(StartRank(row.world_rank, row.incarnation) for row in rows)


def _join(table: Table, loaded: RankRow, now_s: float) -> Outcome:
    report = Report("rank.loaded", f"{now_s - loaded.since_s:.1f} s", loaded.world_rank)
    if any(row.state is not RankState.READY for row in table.ranks):
        return table, (report,)
    generation = Generation(table.generation + 1)
    table = replace(_enter(table, Phase.JOINING, now_s), generation=generation)
    joins = tuple(JoinGeneration(row.world_rank, row.incarnation, generation) for row in table.ranks)
    return table, (report, *joins)


def _run(table: Table, now_s: float) -> Outcome:
    if any(row.state is not RankState.JOINED for row in table.ranks):
        return table, ()
    runs = tuple(RunRank(row.world_rank, row.incarnation) for row in table.ranks)
    report = Report("world.running", f"generation {table.generation}, {len(runs)} ranks")
    return _enter(table, Phase.RUNNING, now_s), (*runs, OpenService(), report)


# -- the way down --------------------------------------------------------------------------------------------


def _end(table: Table, reason: str, now_s: float) -> Outcome:
    """In order: drain if there is a service to drain. A second request changes nothing."""
    if table.phase is Phase.RUNNING:
        table = replace(_enter(table, Phase.DRAINING, now_s), reason=reason)
        until_s = now_s + table.deadlines.drain_s
        return table, (Report("world.draining", reason), DrainService(until_s))
    if table.phase < Phase.RUNNING:
        return _clear(replace(table, reason=reason), now_s)
    return table, ()


def _stop(table: Table, now_s: float) -> Outcome:
    stops = tuple(StopRank(row.world_rank, row.incarnation) for row in table.ranks)
    return _enter(table, Phase.STOPPING, now_s), (CloseService(), *stops)


def _lose(table: Table, error: str, now_s: float) -> Outcome:
    """A rank is gone or useless. On the way down that is one less to wait for; before, the world ends."""
    return _remove_if_over(table, now_s) if table.phase >= Phase.STOPPING else _give_up(table, error, now_s)


def _remove_if_over(table: Table, now_s: float) -> Outcome:
    is_over = all(row.state in (RankState.STOPPED, RankState.DEAD) for row in table.ranks)
    return _remove(table, now_s) if is_over else (table, ())


def _give_up(table: Table, error: str, now_s: float) -> Outcome:
    table, actions = _clear(replace(table, reason=error, is_failure=True), now_s)
    return table, (Report("world.failed", error, is_error=True), *actions)


def _clear(table: Table, now_s: float) -> Outcome:
    table, actions = _remove(table, now_s)
    return table, (CloseService(), *actions)


def _remove(table: Table, now_s: float) -> Outcome:
    """Every process goes, then its place."""
    kills = tuple(KillRank(row.world_rank, row.incarnation) for row in table.ranks if row.has_process)
    rows = tuple(replace(r, state=RankState.DEAD, since_s=now_s) if r.has_process else r for r in table.ranks)
    return replace(_enter(table, Phase.REMOVING, now_s), ranks=rows), (*kills, RemovePlacement())


def _finish(table: Table, now_s: float) -> Outcome:
    report = Report("world.stopped", table.reason, is_error=table.is_failure)
    return _enter(table, Phase.STOPPED, now_s), (report,)


# -- time ----------------------------------------------------------------------------------------------------


def _pass_time(table: Table, now_s: float) -> Outcome:
    """Act on every deadline that is over, the earliest first."""
    actions: tuple[Action, ...] = ()
    while (first := table.next_deadline()) is not None and first[1] <= now_s:
        table, more = _time_out(table, first[0], now_s)
        actions += more
    return table, actions


def _time_out(table: Table, name: str, now_s: float) -> Outcome:
    limit = f"{name}={getattr(table.deadlines, name):g}"
    if name == "lease_s":
        return _end(table, f"the driver's lease is over: no beat within {limit}", now_s)
    match table.phase:
        case Phase.PLACING:
            return _give_up(table, f"the placement group was not ready within {limit}", now_s)
        case Phase.BUILDING:
            state = RankState.STARTING if name == "start_s" else RankState.LOADING
            late = _who(table, state, now_s - getattr(table.deadlines, name))
            return _give_up(table, f"{late} not done {state} within {limit}", now_s)
        case Phase.JOINING:
            late = _who(table, RankState.READY, now_s)
            limit = f"join_s + record_s={table.deadlines.joined_s:g}"
            return _give_up(table, f"{late} did not join within {limit}", now_s)
        case Phase.DRAINING:
            table, actions = _stop(table, now_s)
            return table, (
                Report("world.drain_cut", f"requests were still open after {limit}", is_error=True),
                *actions,
            )
        case Phase.STOPPING:
            return _remove(table, now_s)
    table, actions = _finish(table, now_s)
    return table, (Report("placement.not_removed", f"no answer within {limit}", is_error=True), *actions)


def _who(table: Table, state: RankState, since_s: float) -> str:
    """Names the ranks that have been in `state` since `since_s` or longer."""
    late = [str(row.world_rank) for row in table.ranks if row.state is state and row.since_s <= since_s]
    return f"world rank{'s' if len(late) > 1 else ''} {', '.join(late)}"


def _enter(table: Table, phase: Phase, now_s: float) -> Table:
    return replace(table, phase=phase, since_s=now_s)


def _move(table: Table, row: RankRow, state: RankState, now_s: float) -> Table:
    moved = replace(row, state=state, since_s=now_s)
    return replace(table, ranks=tuple(moved if r.world_rank == row.world_rank else r for r in table.ranks))
