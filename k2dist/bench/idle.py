"""What a cluster costs while nobody asks it anything: CPU time, against as many Ray actors that do nothing.

Both stand in the same Ray, one after the other; what is counted is the CPU time of all of Ray's processes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import psutil
import ray

from k2dist.messages import Message


class IdleCost(Message, frozen=True, kw_only=True):
    """Medians over the windows, in percent of one core."""

    num_actors: int
    num_windows: int
    window_s: float
    cluster_percent: float
    actors_percent: float

    @property
    def more_percent(self) -> float:
        return self.cluster_percent - self.actors_percent


class _Nobody:
    def is_up(self) -> bool:
        return True


@contextmanager
def empty_actors(count: int) -> Iterator[None]:
    """So many actors that do nothing, in the Ray that was joined."""
    kind: Any = ray.remote(num_cpus=0)(_Nobody)
    actors = [kind.remote() for _ in range(count)]
    ray.get([actor.is_up.remote() for actor in actors])
    try:
        yield
    finally:
        for actor in actors:
            ray.kill(actor)


def cpu_percents(root_pid: int, num_windows: int, window_s: float, note: Callable[[], None]) -> list[float]:
    """CPU time of a process and all that came of it, in each window, in percent of one core."""
    percents = []
    for _ in range(num_windows):
        before, began_s = _cpu_s(root_pid), time.monotonic()
        time.sleep(window_s)
        after, ended_s = _cpu_s(root_pid), time.monotonic()
        spent_s = sum(after[pid] - before.get(pid, 0.0) for pid in after)
        percents.append(100.0 * spent_s / (ended_s - began_s))
        note()
    return percents


def idle_cost(num_actors: int, window_s: float, cluster: list[float], actors: list[float]) -> IdleCost:
    return IdleCost(
        num_actors=num_actors,
        num_windows=len(cluster),
        window_s=window_s,
        cluster_percent=median(cluster),
        actors_percent=median(actors),
    )


def _cpu_s(root_pid: int) -> dict[int, float]:
    """CPU seconds of each living process of a tree. One that ends in a window is not counted in it."""
    root = psutil.Process(root_pid)
    spent = {}
    for process in (root, *root.children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        spent[process.pid] = times.user + times.system
    return spent
