"""What `serve` and `demo` share: a cluster that is up, noted, and gone when its command ends."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import FrameType

from k2dist.cli.environment import ray_address, records_dir
from k2dist.cli.examine import examine
from k2dist.cli.progress import StartProgress
from k2dist.cluster.process_mark import mark_process
from k2dist.cluster.record import ClusterRecord, read_record, remove_record, write_record
from k2dist.cluster.start import Cluster, start_cluster
from k2dist.cluster.status import ClusterStatus
from k2dist.cluster.world import World
from k2dist.errors import CapacityError
from k2dist.observe.readiness import StageClock
from k2dist.service.coordinator_actor import CoordinatorActor
from k2dist.service.gateway_actor import GatewayActor


@contextmanager
def launched(
    world: World,
    progress: StartProgress,
    *,
    is_detached: bool,
    is_examined: bool = False,
    clock: StageClock | None = None,
) -> Iterator[tuple[Cluster, ClusterStatus]]:
    """A serving cluster, its start shown by `progress`. SIGTERM and SIGHUP end it as Ctrl-C does.

    `is_examined`: its machines are looked at before anything is loaded; CapacityError if they will not do.
    `clock` is told of each stage.
    """
    address, name = ray_address(), world.config.name
    _refuse_second(name)
    with interrupts(), ExitStack() as showing:
        showing.enter_context(progress)
        clock = clock or StageClock(time.monotonic())
        clock.enter("doctor" if is_examined else "Ray", time.monotonic())
        look = None
        if is_examined and address is None:  # before Ray is started: there is no other machine to look at
            examine(world, progress.note, joins_ray=False)
        elif is_examined:
            look = partial(examine, world, progress.note, joins_ray=True)
        clock.enter("Ray", time.monotonic())
        progress.stage("starting Ray" if address is None else f"joining the Ray at {address}")
        with start_cluster(
            world,
            CoordinatorActor,
            GatewayActor,
            ray_address=address,
            is_detached=is_detached,
            look=look,
            tell=progress.stage,
        ) as cluster:
            interrupts_again()  # Ray has set its own meanwhile
            try:
                status = cluster.await_serving(partial(_show, progress, clock))
                write_record(records_dir(), _record(cluster, status, is_detached=is_detached))
                showing.close()
                yield cluster, status
            finally:
                if not cluster.is_left_running:
                    remove_record(records_dir(), name)


def _show(progress: StartProgress, clock: StageClock, status: ClusterStatus) -> None:
    clock.enter(_STAGES.get(status.phase, status.phase), time.monotonic())
    progress.show(status)


# By phase of the supervision table.
_STAGES = {"new": "supervisor", "building": "loading", "running": "service"}


def _refuse_second(name: str) -> None:
    """One cluster of a name on this machine: `k2dist stop` could not tell them apart."""
    record = read_record(records_dir(), name)
    if record is not None and record.is_running():
        raise CapacityError(
            f"cluster {name!r} is running already, at {record.grpc}; end it with "
            f"`k2dist stop --name {name}`, or give this one another name"
        )


def _record(cluster: Cluster, status: ClusterStatus, *, is_detached: bool) -> ClusterRecord:
    return ClusterRecord(
        name=cluster.name,
        ray_address=cluster.ray_address,
        grpc=status.address,
        http=status.http,
        host=cluster.host.process if cluster.host is not None else None,
        driver=None if is_detached else mark_process(),
    )


@contextmanager
def interrupts() -> Iterator[None]:
    """SIGTERM and SIGHUP are KeyboardInterrupt, until the end of the context."""
    before = {number: signal.getsignal(number) for number in _ENDS}
    interrupts_again()
    try:
        yield
    finally:
        for number, action in before.items():
            signal.signal(number, action)


def interrupts_again() -> None:
    for number in _ENDS:
        signal.signal(number, _interrupt)


_ENDS = (signal.SIGTERM, signal.SIGHUP)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
