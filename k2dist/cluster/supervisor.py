"""The supervisor: one actor that carries out what the supervision table decides, and decides nothing itself.

    event ──> advance(table, event, now) ──> actions ──> Ray calls ──> events ...
                                                └── status: to whoever watches

It is detached and outlives its driver; the lease in the table is what ends it then. When the world has
stopped, it ends itself. One event loop, so the table needs no lock.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, remove_placement_group

from k2dist.cluster.gateway_process import Gateway, GatewayProcess
from k2dist.cluster.placement import await_bundles, reserve
from k2dist.cluster.rank_actor import listen_address
from k2dist.cluster.rank_processes import RankProcesses
from k2dist.cluster.service_process import Service, ServiceProcess
from k2dist.cluster.status import ClusterStatus, RankStatus
from k2dist.cluster.supervisor_handle import SupervisorHandle
from k2dist.cluster.world import Rendezvous, World
from k2dist.cluster.world_watch import WorldWatch
from k2dist.config.cluster import DeadlinesConfig
from k2dist.errors import K2Error
from k2dist.ids import Generation, WorldRank
from k2dist.messages import RankProgress, RankStats
from k2dist.observe import Recoveries, WorldState
from k2dist.observe.event_log import EventLog, set_up_logs
from k2dist.supervision.advance import advance
from k2dist.supervision.events import (
    Action,
    Beat,
    Begin,
    CloseService,
    CreatePlacement,
    Drained,
    DrainService,
    Event,
    Failed,
    JoinGeneration,
    KillRank,
    LoadRank,
    OpenService,
    Placed,
    PlacementFailed,
    Removed,
    RemovePlacement,
    Report,
    RunRank,
    StartRank,
    StopRank,
    StopRequested,
    Tick,
)
from k2dist.supervision.table import Phase, RankState, first_table

NAME = "supervisor"
_PROGRESS_S = 0.25  # how often a loading rank is asked how far it is
_LAST_WORDS_S = 2.0  # between the end and the end of this process: for watchers to read the last status
_log = EventLog(logging.getLogger(__name__))


class Supervisor:
    """See the module. A Ray actor's class; call `begin` once."""

    def __init__(
        self, world: World, service: type[Service], gateway: type[Gateway], *, has_lease: bool
    ) -> None:
        set_up_logs(world.config.observe.log_level, world.config.observe.log_format, process="supervisor")
        self._world = world
        self._table = first_table(
            world.layout.world_size, world.config.deadlines, has_lease=has_lease, now_s=time.monotonic()
        )
        self._ranks = RankProcesses(world)
        self._watch = WorldWatch(world, self._ranks)
        self._recoveries = Recoveries()
        inner_key = secrets.token_urlsafe(32)  # by which the coordinator knows the gateway
        self._service = ServiceProcess(world, service, inner_key)
        self._gateway = GatewayProcess(world, gateway, inner_key)
        self._group: PlacementGroup | None = None
        self._store: Any = None  # torch's TCPStore of this generation; it serves while it is held
        self._meeting: asyncio.Task[Rendezvous] | None = None
        self._address = ""
        self._http = ""
        self._service_error = ""
        self._revision = 0
        self._changed = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[Any]] = set()

    # -- what drivers call -----------------------------------------------------------------------------

    async def begin(self) -> None:
        """Build the world; `wait` tells how it goes."""
        self._take(Begin())

    async def beat(self) -> None:
        """The driver lives."""
        self._take(Beat())

    async def stop(self, reason: str) -> None:
        """End the world: drain, stop, remove. Does not wait for it."""
        self._take(StopRequested(reason))

    async def deadlines(self) -> DeadlinesConfig:
        """For whoever ends it without having its configuration."""
        return self._world.config.deadlines

    async def status(self) -> ClusterStatus:
        return ClusterStatus(
            revision=self._revision,
            phase=self._table.phase.name.lower(),
            generation=self._table.generation,
            ranks=tuple(self._rank_status(row.world_rank, row.state) for row in self._table.ranks),
            address=self._address,
            http=self._http,
            reason=self._service_error or self._table.reason,
            is_failure=self._table.is_failure or bool(self._service_error),
        )

    async def wait(self, revision: int, timeout_s: float) -> ClusterStatus:
        """The status once it is newer than `revision`, or as it is after `timeout_s`."""
        if self._revision <= revision:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), timeout_s)
        return await self.status()

    async def rank_stats(self) -> tuple[RankStats, ...]:
        """Of every rank, in rank order."""
        return await self._ranks.stats()

    async def world_state(self) -> WorldState:
        """Every rank with what it counts; within seconds, also where some do not answer."""
        status = await self.status()
        return WorldState(
            generation=status.generation,
            phase=status.phase,
            ranks=await self._watch.look(status.ranks),
            recoveries=self._recoveries.facts(time.monotonic()),
        )

    # -- the table -------------------------------------------------------------------------------------

    def _take(self, event: Event) -> None:
        self._table, actions = advance(self._table, event, time.monotonic())
        for action in actions:
            self._carry_out(action)
        self._set_timer()
        phase = self._table.phase
        self._recoveries.note(
            self._table.generation,
            time.monotonic(),
            is_running=phase is Phase.RUNNING,
            is_ending=phase >= Phase.DRAINING,
        )
        if not isinstance(event, Beat | Tick) or actions:
            self._note_change()
        if self._table.phase is Phase.STOPPED and actions:
            self._spawn(self._end())

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        deadline = self._table.next_deadline()
        self._timer = None
        if deadline is not None:
            delay_s = max(deadline[1] - time.monotonic(), 0.0)
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._take, Tick())

    def _note_change(self) -> None:
        self._revision += 1
        self._changed.set()
        self._changed = asyncio.Event()

    # -- actions ---------------------------------------------------------------------------------------

    def _carry_out(self, action: Action) -> None:
        match action:
            case CreatePlacement():
                self._spawn(self._place())
            case StartRank():
                assert self._group is not None
                self._ranks.create(action, self._group)
                self._spawn_event(self._ranks.start(action))
                if action.world_rank == self._world.layout.world_size - 1:  # its lanes can be named now
                    self._service.create(self._ranks.lanes(), self._handle())
                    self._gateway.create()
            case LoadRank():
                self._spawn_event(self._ranks.load(action))
                self._spawn(self._follow(action.world_rank, RankState.LOADING))
            case JoinGeneration():
                self._spawn(self._join(action))
            case RunRank():
                self._spawn_event(self._ranks.run(action))
            case OpenService():
                self._spawn(self._open_service())
            case DrainService(until_s):
                self._spawn(self._drain(until_s))
            case CloseService():
                self._address = self._http = ""
                self._spawn(self._close_service())
            case StopRank(world_rank):
                self._ranks.stop(world_rank)
            case KillRank(world_rank):
                self._ranks.kill(world_rank)
            case RemovePlacement():
                self._spawn(self._remove())
            case Report(name, detail, world_rank, is_error):
                tell = _log.error if is_error else _log.info
                tell(name, world_rank=world_rank, detail=detail)

    async def _place(self) -> None:
        try:
            self._group = reserve(self._world)
            await asyncio.to_thread(await_bundles, self._group, self._world)
        except K2Error as error:
            self._take(PlacementFailed(str(error)))
        else:
            self._take(Placed())

    async def _follow(self, rank: WorldRank, state: RankState) -> None:
        """Keep the status up to date while the rank is in `state`: it loads, or records its steps."""
        while self._table.ranks[rank].state is state:
            before = self._ranks.progress.get(rank)
            await self._ranks.ask_progress(rank)
            if self._ranks.progress.get(rank) != before:
                self._note_change()
            await asyncio.sleep(_PROGRESS_S)

    async def _join(self, action: JoinGeneration) -> None:
        """The first rank's turn hosts the generation's store; all join over it."""
        if self._meeting is None:
            self._meeting = asyncio.create_task(self._host_store(action.generation))
        try:
            meeting = await self._meeting
        except K2Error as error:
            self._take(Failed(action.world_rank, action.incarnation, str(error)))
            return
        self._spawn(self._follow(action.world_rank, RankState.READY))
        self._take(await self._ranks.join(action, meeting))

    async def _host_store(self, generation: Generation) -> Rendezvous:
        address = listen_address(self._world.config.network.address)
        self._store, meeting = await asyncio.to_thread(_host_store, generation, address)
        return meeting

    async def _open_service(self) -> None:
        """A service that cannot open, or dies, ends the world; the table has no row for it yet."""
        try:
            address = await self._service.open()
            self._http = await self._gateway.open(address)
        except K2Error as error:
            self._end_without_service(error)
            return
        self._address = address
        self._note_change()
        self._spawn(self._gateway.keep(address))
        trouble = await self._service.watch()
        if self._table.phase <= Phase.RUNNING:
            self._end_without_service(trouble)

    async def _close_service(self) -> None:
        """The gateway first: it is a client of the other."""
        await self._gateway.close()
        await self._service.close()

    def _end_without_service(self, error: K2Error) -> None:
        self._service_error = str(error)
        self._take(StopRequested(self._service_error))

    async def _drain(self, until_s: float) -> None:
        await self._service.drain(max(until_s - time.monotonic(), 0.0))
        self._take(Drained())

    async def _remove(self) -> None:
        if self._group is not None:
            await asyncio.to_thread(remove_placement_group, self._group)  # what still runs in it is killed
        self._store = None
        self._take(Removed())

    async def _end(self) -> None:
        """Nothing is left but this process."""
        others = self._tasks - {asyncio.current_task()}
        if others:
            await asyncio.wait(others, timeout=_LAST_WORDS_S)
        await asyncio.sleep(_LAST_WORDS_S)
        ray.kill(ray.get_runtime_context().current_actor, no_restart=True)

    # --------------------------------------------------------------------------------------------------

    def _handle(self) -> SupervisorHandle:
        actor = ray.get_runtime_context().current_actor
        return SupervisorHandle(actor, call_s=self._world.config.deadlines.call_s)

    def _rank_status(self, world_rank: WorldRank, state: RankState) -> RankStatus:
        process = self._ranks.processes.get(world_rank)
        progress = self._ranks.progress.get(world_rank, RankProgress())
        return RankStatus(
            world_rank=world_rank,
            state=state.value,
            node=process.node if process else "",
            pid=process.pid if process else 0,
            progress=progress,
        )

    def _spawn_event(self, call: Coroutine[Any, Any, Event]) -> None:
        async def report() -> None:
            self._take(await call)

        self._spawn(report())

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._note_done)

    def _note_done(self, task: asyncio.Task[Any]) -> None:
        """A bug here must not leave a world that nobody watches."""
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.bug("supervisor.bug", error)
            self._service_error = f"a bug in the supervisor: {type(error).__name__}: {error}"
            self._take(StopRequested(self._service_error))


def _host_store(generation: Generation, address: str) -> tuple[Any, Rendezvous]:
    """The store, and how ranks find it. Torch is imported here: no earlier, and not on the event loop."""
    from k2dist.comm import host_store

    store = host_store(address)
    return store, Rendezvous(generation=generation, host=address, port=store.port)
