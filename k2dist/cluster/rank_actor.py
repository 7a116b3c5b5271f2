"""One rank in a process of its own: a Ray actor round `engine.RankRuntime`.

The supervisor drives it: `load`, `join`, `run`, one after the other in the actor's default thread. All other
methods answer meanwhile, in the threads of the groups that `THREADS` names: `admit` in 4.2 ms in the median
and 6.3 ms at p95 while four ranks step on 2 cores, at Python's own switch interval (`k2dist bench latency`).
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import ray
from msgspec.structs import replace

from k2dist.cluster.world import Rendezvous, World
from k2dist.errors import UnavailableError
from k2dist.ids import RequestId, WorldRank
from k2dist.messages import (
    AdmitReply,
    EventBatch,
    LaneLoad,
    LiveRequest,
    LoadSeconds,
    Message,
    RankProgress,
    RankStats,
    Request,
)
from k2dist.observe.event_log import set_up_logs

if TYPE_CHECKING:  # torch comes with these, and reads its number of threads when it is imported
    from k2dist.engine import LanePort, RankRuntime

# Threads of each concurrency group, besides the default one. A long poll holds one of "events" for seconds;
# one poll at a time is served, and those that a dead coordinator left behind.
THREADS = {"control": 2, "bell": 1, "events": 4}

F = TypeVar("F", bound=Callable[..., Any])


def _in_group(name: str) -> Callable[[F], F]:
    """Ray's decorator, with a type: the method runs in the threads of concurrency group `name`."""
    decorator: Callable[[F], F] = ray.method(concurrency_group=name)
    return decorator


class RankProcess(Message, frozen=True, kw_only=True):
    """Where a rank's process is."""

    node: str
    pid: int


class RankActor:
    """See the module. `world_rank` of `world`; nothing is read before `load`."""

    def __init__(self, world: World, world_rank: WorldRank) -> None:
        _set_threads(world.config.ranks.threads)
        observe = world.config.observe
        set_up_logs(observe.log_level, observe.log_format, process=f"rank-{world_rank}")
        self._world = world
        self._world_rank = world_rank
        self._runtime: RankRuntime | None = None
        self._progress = RankProgress()

    # -- one after the other ---------------------------------------------------------------------------

    def load(self) -> None:
        """Read this rank's own bytes, test them, and take a step of each size that will be recorded.

        Errors: CheckpointError, FaultyRankError.
        """
        from k2dist.cluster.rank_spec import rank_spec
        from k2dist.engine import RankRuntime

        runtime = RankRuntime(rank_spec(self._world, self._world_rank))
        report = runtime.load(self._note_progress)
        progress = self._progress
        seconds = LoadSeconds(
            find_s=progress.find_s,
            read_s=progress.read_s,
            lay_out_s=report.load_s - progress.find_s - progress.read_s,
            test_s=report.self_test.test_s,
            warm_s=report.warm_s,
        )
        self._progress = replace(progress, seconds=seconds)
        self._runtime = runtime
        # What is here now stays. A full collection, which may fall into any step, took 0.29 s for 420,000
        # objects, and takes less than a millisecond then.
        gc.collect()
        gc.freeze()

    def join(self, meeting: Rendezvous, peers: Sequence[Any]) -> None:
        """Become a member of all groups of a generation, and record its steps; `peers` are all rank actors.

        Errors: PeerError; ConfigError if ranks are not alike.
        """
        from k2dist.cluster.groups import join_groups
        from k2dist.comm.nccl import ENVIRONMENT

        config = self._world.config
        device = self._loaded().device
        if device.type == "cuda":
            for name, value in ENVIRONMENT.items():
                os.environ[name] = value
        comms = join_groups(
            meeting,
            self._world.layout,
            self._world_rank,
            address=listen_address(config.network.address),
            device=device,
            deadlines=config.deadlines,
            fingerprint=self._loaded().fingerprint(),
            allows_mix=config.ranks.allow_mix,
        )
        self._loaded().join(comms, _ActorBells(peers), meeting.generation)
        began_s = time.monotonic()
        self._loaded().record(self._note_recorded)
        if self._progress.seconds is not None:
            seconds = replace(self._progress.seconds, record_s=time.monotonic() - began_s)
            self._progress = replace(self._progress, seconds=seconds)

    def run(self) -> None:
        """Step until `stop`. Errors: PeerError, FencedError; what the lane had open has then failed."""
        self._loaded().run()

    # -- at any time -----------------------------------------------------------------------------------

    @_in_group("control")
    def process(self) -> RankProcess:
        return RankProcess(node=ray.util.get_node_ip_address(), pid=os.getpid())

    @_in_group("control")
    def progress(self) -> RankProgress:
        """How far `load` is."""
        return self._progress

    @_in_group("control")
    def stats(self) -> RankStats:
        return self._loaded().stats()

    @_in_group("control")
    def stop(self) -> None:
        """Leave the step loop with all other ranks; does not wait for it."""
        self._loaded().stop()

    @_in_group("control")
    def fence(self) -> None:
        self._loaded().fence()

    @_in_group("bell")
    def ring(self, epoch: int) -> None:
        self._loaded().ring(epoch)

    # -- of a lane's first rank ------------------------------------------------------------------------

    @_in_group("control")
    def admit(self, requests: tuple[Request, ...]) -> tuple[AdmitReply, ...]:
        return self._port().admit(requests)

    @_in_group("control")
    def cancel(self, ids: tuple[RequestId, ...]) -> None:
        self._port().cancel(ids)

    @_in_group("events")
    def events(self, after: int, timeout_s: float) -> EventBatch:
        return self._port().events(after, timeout_s)

    @_in_group("control")
    def live(self) -> tuple[LiveRequest, ...]:
        return self._port().live()

    @_in_group("control")
    def lane_load(self) -> LaneLoad:
        return self._port().load()

    @_in_group("control")
    def drain(self) -> None:
        self._port().drain()

    # --------------------------------------------------------------------------------------------------

    def _loaded(self) -> RankRuntime:
        if self._runtime is None:
            raise UnavailableError(f"world rank {self._world_rank} has not loaded its weights")
        return self._runtime

    def _port(self) -> LanePort:
        port = self._loaded().port
        assert port is not None, f"world rank {self._world_rank} is not the first of a lane"
        return port

    def _note_progress(self, progress: RankProgress) -> None:
        self._progress = progress

    def _note_recorded(self, num_recorded: int, num_graphs: int) -> None:
        self._progress = replace(self._progress, num_graphs_recorded=num_recorded, num_graphs=num_graphs)


class _ActorBells:
    """Doorbells of ranks that are actors. A ring that is lost with its actor is seen by the supervisor."""

    def __init__(self, peers: Sequence[Any]) -> None:
        self._peers = tuple(peers)

    def ring_all(self, epoch: int) -> None:
        for peer in self._peers:
            peer.ring.remote(epoch)


def listen_address(configured: str) -> str:
    """`network.address` for this process: as it stands, or the one by which Ray knows this node."""
    return ray.util.get_node_ip_address() if configured == "node" else configured


def _set_threads(threads: int) -> None:
    """Before torch is imported: OpenMP and MKL look at this once. Waiting threads leave their cores to others
    (`cli.environment` says why)."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(threads)
