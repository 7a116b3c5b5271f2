"""A load on a running server, and what its clients wait for.

concurrency   so many clients, each of which asks again as soon as it has its answer
rate          requests begin at random times (Poisson's), so many a second, however the server fares; with a
              concurrency too, no more than that are under way, and what waits for its turn waits measurably
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterator

from k2dist.bench.serve_asks import Ask
from k2dist.bench.serve_report import Sample, ServeReport, summarise
from k2dist.bench.serve_targets import Target
from k2dist.errors import UnavailableError
from k2dist.messages import Message

CONCURRENCY = 16


class Load(Message, frozen=True, kw_only=True):
    """`rate_per_s` None: as fast as answers come. `concurrency` None: without a rate 16, else no bound."""

    num_requests: int
    concurrency: int | None = None
    rate_per_s: float | None = None
    seed: int = 0


async def measure(
    target: Target, asks: Iterator[Ask], load: Load, note: Callable[[], object] = lambda: None
) -> ServeReport:
    """`note`: called after each answer. UnavailableError: nothing came."""
    samples: list[Sample] = []
    async with target:
        room = _room(load)
        began_s = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for due_s in _due_times(load, began_s):
                await asyncio.sleep(max(due_s - time.perf_counter(), 0.0))
                if room is not None:
                    await room.acquire()
                # Without a rate a request is due when there is room for it.
                sample = Sample(due_s=due_s if load.rate_per_s else time.perf_counter())
                samples.append(sample)
                group.create_task(_ask(target, next(asks), sample, room, note))
    report = summarise(target.url, samples)
    if report.num_failed == report.num_requests:
        raise UnavailableError(f"{target.url}: no request was answered: {next(iter(report.errors))}")
    return report


async def _ask(
    target: Target,
    ask: Ask,
    sample: Sample,
    room: asyncio.Semaphore | None,
    note: Callable[[], object],
) -> None:
    try:
        await target.ask(ask, sample)
    finally:
        sample.ended_s = time.perf_counter()
        if room is not None:
            room.release()
    note()


def _room(load: Load) -> asyncio.Semaphore | None:
    if load.concurrency is None and load.rate_per_s is not None:
        return None
    return asyncio.Semaphore(load.concurrency or CONCURRENCY)


def _due_times(load: Load, began_s: float) -> Iterator[float]:
    draw = random.Random(load.seed)
    due_s = began_s
    for _ in range(load.num_requests):
        yield due_s
        if load.rate_per_s is not None:
            due_s += draw.expovariate(load.rate_per_s)
