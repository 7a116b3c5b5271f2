"""A cluster as its driver holds it: Ray found or started, the supervisor in it, the lease kept, the end.

with start_cluster(world, service, ...) as cluster:
    cluster.await_serving(show)
    ...                              on the way out the cluster ends, unless it was left running
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError
from ray.util.placement_group import get_placement_group, remove_placement_group

from k2dist.cluster import placement, supervisor
from k2dist.cluster.gateway_process import Gateway
from k2dist.cluster.placement import await_capacity, detached_here
from k2dist.cluster.ray_host import RayHost, start_host
from k2dist.cluster.service_process import Service
from k2dist.cluster.status import ClusterStatus
from k2dist.cluster.world import World
from k2dist.config.cluster import DeadlinesConfig
from k2dist.errors import CapacityError, PeerError, UnavailableError
from k2dist.messages import RankStats

_POLL_S = 0.5  # between two looks at a cluster that does not change
_HOST_STOP_S = 10.0  # for Ray's own processes to end in order


class Cluster:
    """One cluster, by its supervisor. Belongs to one thread of a driver."""

    def __init__(self, name: str, actor: Any, deadlines: DeadlinesConfig, host: RayHost | None) -> None:
        self.name = name
        self.host = host  # of a Ray of its own
        self.is_left_running = False
        self._actor = actor
        self._deadlines = deadlines

    def begin(self) -> None:
        """Let the supervisor build its world; `await_serving` follows it."""
        self._answer(self._actor.begin.remote(), self._deadlines.start_s)

    def await_serving(self, show: Callable[[ClusterStatus], None]) -> ClusterStatus:
        """Wait until it serves, showing each status. Errors: UnavailableError with the reason if it ends."""
        for status in self.statuses():
            show(status)
            if status.address:
                return status
            if status.reason:
                raise UnavailableError(self.last_words(status))
        raise AssertionError("statuses end only with an error")

    def statuses(self) -> Iterator[ClusterStatus]:
        """Each new status, and the old one again every `_POLL_S`. Errors: UnavailableError, PeerError."""
        revision = -1
        while True:
            status = self._answer(self._actor.wait.remote(revision, _POLL_S), _POLL_S)
            revision = status.revision
            yield status

    def rank_stats(self) -> tuple[RankStats, ...]:
        """Of every rank, in rank order."""
        stats: tuple[RankStats, ...] = self._answer(self._actor.rank_stats.remote(), 0.0)
        return stats

    @property
    def ray_address(self) -> str:
        address: str = ray.get_runtime_context().gcs_address
        return address

    def end(self, reason: str) -> None:
        """Let it drain and stop, and wait until nothing of it is left. By force where it does not answer, or
        on a further KeyboardInterrupt."""
        limits = self._deadlines
        give_up_s = time.monotonic() + limits.drain_s + 2 * limits.stop_s + limits.call_s
        with suppress(UnavailableError, PeerError, KeyboardInterrupt):
            self._answer(self._actor.stop.remote(reason), 0.0)
            for status in self.statuses():
                if status.has_ended or time.monotonic() > give_up_s:
                    break
        sweep(self.name)

    def last_words(self, status: ClusterStatus) -> str:
        where = f" (its processes' logs: {self.host.process.log_dir})" if self.host is not None else ""
        return f"cluster {self.name!r} ended: {status.reason}{where if status.is_failure else ''}"

    def _answer(self, ref: Any, more_s: float) -> Any:
        try:
            return ray.get(ref, timeout=self._deadlines.call_s + more_s)
        except GetTimeoutError as error:
            limit = f"deadlines.call_s={self._deadlines.call_s:g}"
            raise PeerError(f"the supervisor of {self.name!r} did not answer within {limit}") from error
        except RayActorError as error:
            raise UnavailableError(f"the supervisor of cluster {self.name!r} is gone") from error


@contextmanager
def start_cluster(
    world: World,
    service: type[Service],
    gateway: type[Gateway],
    *,
    ray_address: str | None,
    is_detached: bool,
    look: Callable[[], None] | None = None,
    tell: Callable[[str], None],
) -> Iterator[Cluster]:
    """Begin a cluster in the Ray at `ray_address`, or in one of its own. It ends with the context, unless
    `is_left_running` was set; while it runs it is held by a lease, unless it is detached. `tell` hears what
    it waits for; `look` is called once Ray has what the ranks take, before any is started, and may raise.

    Errors: CapacityError (Ray, machines, a cluster of that name), PeerError.
    """
    name, deadlines = world.config.name, world.config.deadlines
    with ExitStack() as stack:
        host = None
        if ray_address is None:
            host = start_host(world.config.ray, is_detached=is_detached, deadline_s=deadlines.start_s)
            stack.callback(host.stop, _HOST_STOP_S)
            ray_address = host.process.address
        stack.callback(ray.shutdown)
        _join_once_there(ray_address, name, deadlines.nodes_s, tell)
        _clear_orphans(name)
        await_capacity(world, tell)
        if look is not None:
            look()
        actor = _start_supervisor(world, service, gateway, has_lease=not is_detached)
        cluster = Cluster(name, actor, deadlines, host)
        stack.callback(cluster.end, "its driver is done")
        if not is_detached:
            stack.enter_context(_lease(actor, deadlines.lease_beat_s))
        cluster.begin()
        yield cluster
        if cluster.is_left_running:
            stack.pop_all()
            ray.shutdown()


def find_cluster(name: str) -> Cluster | None:
    """The cluster of this name in the Ray that was joined, if its supervisor is there and answers."""
    try:
        actor = ray.get_actor(supervisor.NAME, namespace=name)
        deadlines = ray.get(actor.deadlines.remote(), timeout=DeadlinesConfig().call_s)
    except (ValueError, GetTimeoutError, RayActorError):
        return None
    return Cluster(name, actor, deadlines, None)


def join_ray(address: str, namespace: str) -> None:
    """Become a driver of a running Ray. CapacityError if there is none."""
    # Else Ray prints a paragraph on stdout for each process that dies, whatever log_to_driver says.
    ray._private.worker._worker_logs_enabled = False
    try:
        ray.init(address=address, namespace=namespace, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise CapacityError(f"no Ray at {address}: {reason}; start one, or unset RAY_ADDRESS") from error


@contextmanager
def joined_ray(address: str, namespace: str) -> Iterator[None]:
    """A driver of a running Ray, for as long as the context lasts."""
    join_ray(address, namespace)
    try:
        yield
    finally:
        ray.shutdown()


def _join_once_there(address: str, namespace: str, nodes_s: float, tell: Callable[[str], None]) -> None:
    """`join_ray`, tried again for `nodes_s`: this machine may be one of those that have not joined yet."""
    give_up_s = time.monotonic() + nodes_s
    while True:
        try:
            join_ray(address, namespace)
        except CapacityError:
            if time.monotonic() >= give_up_s:
                raise
            tell(f"waiting for the Ray at {address}")
            time.sleep(_POLL_S)
        else:
            return


def sweep(namespace: str) -> list[str]:
    """Kill every named actor of a namespace and remove its placement group; names of what was there."""
    names = [
        entry["name"]
        for entry in ray.util.list_named_actors(all_namespaces=True)
        if entry["namespace"] == namespace
    ]
    for name in names:
        with suppress(ValueError):  # it ended meanwhile
            ray.kill(ray.get_actor(name, namespace=namespace), no_restart=True)
    with suppress(ValueError):
        remove_placement_group(get_placement_group(placement.NAME))
    return names


def _clear_orphans(name: str) -> None:
    """End what a supervisor that died, with its node or by itself, has left: nobody else would."""
    try:
        ray.get_actor(supervisor.NAME, namespace=name)
    except ValueError:
        sweep(name)


def _start_supervisor(
    world: World, service: type[Service], gateway: type[Gateway], *, has_lease: bool
) -> Any:
    try:
        return (
            ray.remote(supervisor.Supervisor)
            .options(**detached_here(supervisor.NAME))
            .remote(world, service, gateway, has_lease=has_lease)
        )
    except ValueError as error:  # Ray's only answer to a name that is taken
        raise CapacityError(
            f"cluster {world.config.name!r} runs in this Ray already; end it with `k2dist stop`, "
            "or give this one another name"
        ) from error


@contextmanager
def _lease(actor: Any, beat_s: float) -> Iterator[None]:
    """Beat as long as the context lasts. A beat that is lost is made good by the next."""
    is_over = threading.Event()

    def keep() -> None:
        while not is_over.wait(beat_s):
            with suppress(RayError):
                actor.beat.remote()

    thread = threading.Thread(target=keep, name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
