"""The processes that carry tokens from a lane to clients, as a cluster has them, with a stub for the lane.

coordinator (with StubLane) ──gRPC──> clients
         └──gRPC──> gateway ──SSE──> clients
"""

from __future__ import annotations

import asyncio
import multiprocessing as mp
import os
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.sharedctypes import Synchronized

import psutil

from k2dist.bench.stub_lane import StubLane
from k2dist.config.cluster import CacheConfig, ClusterConfig, ParallelConfig, SchedulerConfig, ServiceConfig
from k2dist.demo import MODEL_DIR
from k2dist.errors import PeerError
from k2dist.service.coordinator_actor import CoordinatorActor
from k2dist.service.gateway_actor import GatewayActor

_START_S, _STOP_S = 60.0, 10.0
_STEP_TOKENS = 8192
_TOKEN_ID = ord("a")  # a byte by itself, so that each token is a piece of text


class Carriers:
    """What runs. `pace`: tokens/s that the lane is to make. `num_made`: how many it has made so far."""

    def __init__(
        self, addresses: dict[str, str], processes: dict[str, psutil.Process], dials: _Dials
    ) -> None:
        self.addresses = addresses  # by "grpc" and, with a gateway, "http"
        self._processes = processes
        self._dials = dials

    @property
    def num_made(self) -> int:
        return int(self._dials.num_made.value)

    def set_pace(self, tokens_per_s: float) -> None:
        self._dials.pace.value = tokens_per_s

    def rss_bytes(self) -> dict[str, int]:
        return {name: int(process.memory_info().rss) for name, process in self._processes.items()}

    def cpu_s(self) -> dict[str, float]:
        """Since their start."""
        times = {name: process.cpu_times() for name, process in self._processes.items()}
        return {name: float(one.user + one.system) for name, one in times.items()}


@dataclass(frozen=True, slots=True)
class _Dials:
    """Shared with the stub."""

    pace: Synchronized[float]
    num_made: Synchronized[int]


@contextmanager
def carriers(num_streams: int, *, with_gateway: bool, cores: set[int]) -> Iterator[Carriers]:
    """Started, each with `cores` to run on. PeerError: one does not come up."""
    spawn = mp.get_context("spawn")
    dials = _Dials(spawn.Value("d", 1000.0), spawn.Value("q", 0))
    config = _config(num_streams)
    running: list[tuple[mp.process.BaseProcess, Connection]] = []

    def start(name: str, target: Callable[..., None], *args: object) -> str:
        ours, theirs = spawn.Pipe()
        process = spawn.Process(target=target, args=(theirs, cores, config, *args), name=name, daemon=True)
        process.start()
        running.append((process, ours))
        if not ours.poll(_START_S):
            raise PeerError(f"the {name} did not come up within {_START_S:g} s")
        try:
            return str(ours.recv())
        except EOFError as error:
            raise PeerError(f"the {name} ended before it served; its error stands above") from error

    try:
        addresses = {"grpc": start("coordinator", _run_coordinator, dials.pace, dials.num_made)}
        if with_gateway:
            addresses["http"] = start("gateway", _run_gateway, addresses["grpc"])
        processes = {process.name: psutil.Process(process.pid) for process, _ in running}
        yield Carriers(addresses, processes, dials)
    finally:
        for process, pipe in reversed(running):
            pipe.close()  # which ends it
            process.join(_STOP_S)
            if process.is_alive():
                process.kill()
                process.join()


def _run_coordinator(
    pipe: Connection,
    cores: set[int],
    config: ClusterConfig,
    pace: Synchronized[float],
    num_made: Synchronized[int],
) -> None:
    def note(num_tokens: int) -> None:
        num_made.value += num_tokens  # one writer

    lane = StubLane(_TOKEN_ID, lambda: pace.value, note)
    actor = CoordinatorActor(config, MODEL_DIR, (lane,))
    _run(pipe, cores, actor.start, actor.stop)


def _run_gateway(pipe: Connection, cores: set[int], config: ClusterConfig, coordinator: str) -> None:
    actor = GatewayActor(config)
    _run(pipe, cores, lambda: actor.start(coordinator, "127.0.0.1:0"), actor.stop)


def _run(
    pipe: Connection,
    cores: set[int],
    start: Callable[[], Awaitable[str]],
    stop: Callable[[], Awaitable[None]],
) -> None:
    os.sched_setaffinity(0, cores)

    async def serve() -> None:
        pipe.send(await start())
        is_over = asyncio.Event()
        asyncio.get_running_loop().add_reader(pipe.fileno(), is_over.set)  # closed at the other end
        await is_over.wait()
        asyncio.get_running_loop().remove_reader(pipe.fileno())
        await stop()

    asyncio.run(serve())


def _config(num_streams: int) -> ClusterConfig:
    """One lane with room for all streams; what is kept and for how long is as a cluster has it."""
    return ClusterConfig(
        name="bench",
        parallel=ParallelConfig(lanes=1, tp=1),
        cache=CacheConfig(page_tokens=64, num_pages=1024),
        scheduler=SchedulerConfig(
            max_running=2 * num_streams, step_tokens=max(_STEP_TOKENS, 2 * num_streams)
        ),
        service=ServiceConfig(grpc="127.0.0.1:0", http="127.0.0.1:0"),
    )
