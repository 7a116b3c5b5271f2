"""How many tokens coordinator and gateway carry to many streams, one in each event; and in what memory.

The lane is a stub at a set pace. Streams of differing length end and begin all the time, so that reading
requests, starting answers and forgetting them are in the figures, and the request log is as full as it gets.
The clients run on the same cores.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from k2dist.bench.carriers import Carriers, carriers
from k2dist.bench.serve_asks import Ask, made_up
from k2dist.bench.serve_report import Sample
from k2dist.bench.serve_targets import Target, make_target
from k2dist.errors import UnavailableError
from k2dist.messages import Message

Over = Literal["grpc", "sse"]

NUM_STREAMS = 256
NUM_CORES = 2
WINDOW_S = 4.0
SETTLE_S = 1.5  # after a change of pace
_FIRST_PACE = {"grpc": 2000.0, "sse": 1000.0}
_MORE = 1.2  # each pace of a search in the one before
_NUM_LOST = 2  # so many in a row that are not held end it: one may be something else's fault
_HELD = 0.97  # of the pace, in events: less means that events were merged, or late
_INPUT_LEN = 32
_OUTPUT_LENS = (128, 384)
_NUM_READINGS = 20
_TIMEOUT_S = 600.0


class Window(Message, frozen=True, kw_only=True):
    """Some seconds at one pace. us_per_event: CPU time, by process."""

    pace_per_s: float
    events_per_s: float
    tokens_per_event: float
    us_per_event: dict[str, float]

    @property
    def is_held(self) -> bool:
        return self.events_per_s >= _HELD * self.pace_per_s


class GatewayReport(Message, frozen=True, kw_only=True):
    """`windows`: of a search, rising; or one long one. rss_mb: by process, readings from begin to end."""

    over: str
    num_streams: int
    num_cores: int
    windows: tuple[Window, ...]
    num_answers: int
    rss_mb: dict[str, tuple[float, ...]]

    @property
    def best(self) -> Window:
        """The fastest pace that was held; the first one if none was."""
        return max((one for one in self.windows if one.is_held), key=_pace, default=self.windows[0])


def measure(
    over: Over,
    *,
    num_streams: int = NUM_STREAMS,
    num_cores: int = NUM_CORES,
    pace_per_s: float | None = None,
    seconds: float = WINDOW_S,
    show: Callable[[int, int], object] = lambda done, total: None,
) -> GatewayReport:
    """`pace_per_s` None: rising, until one is not held, each for `seconds`; else this one for `seconds`.

    UnavailableError: streams fail.
    """
    before = os.sched_getaffinity(0)
    cores = set(sorted(before)[:num_cores])
    os.sched_setaffinity(0, cores)
    try:
        with carriers(num_streams, with_gateway=over == "sse", cores=cores) as running:
            scheme = "grpc" if over == "grpc" else "http"
            target = make_target(f"{scheme}://{running.addresses[scheme]}", model="", timeout_s=_TIMEOUT_S)
            bench = _Bench(over, running, target, num_streams)
            return asyncio.run(bench.run(pace_per_s, seconds, len(cores), show))
    finally:
        os.sched_setaffinity(0, before)


@dataclass(frozen=True, slots=True)
class _Count:
    at_s: float
    num_events: int
    num_made: int
    cpu_s: dict[str, float]


class _Bench:
    def __init__(self, over: Over, running: Carriers, target: Target, num_streams: int) -> None:
        self._over = over
        self._running = running
        self._target = target
        self._num_streams = num_streams
        self._num_events = 0  # of streams that have ended
        self._num_answers = 0
        self._open: dict[int, Sample] = {}

    async def run(
        self, pace_per_s: float | None, seconds: float, num_cores: int, show: Callable[[int, int], object]
    ) -> GatewayReport:
        paces = _search(_FIRST_PACE[self._over]) if pace_per_s is None else iter((pace_per_s,))
        windows: list[Window] = []
        rss_mb: dict[str, list[float]] = {}
        async with self._target:
            streams = [asyncio.create_task(self._stream(number)) for number in range(self._num_streams)]
            try:
                for number, pace in enumerate(paces, start=1):
                    self._running.set_pace(pace)
                    await self._sleep(SETTLE_S, streams)
                    is_only = pace_per_s is not None
                    window = await self._window(pace, seconds, streams, rss_mb, show, is_only=is_only)
                    windows.append(window)
                    if not is_only:
                        show(number, number + 1)
                    if [one.is_held for one in windows[-_NUM_LOST:]] == [False] * _NUM_LOST:
                        break
            finally:
                for stream in streams:
                    stream.cancel()
                await asyncio.gather(*streams, return_exceptions=True)
        return GatewayReport(
            over=self._over,
            num_streams=self._num_streams,
            num_cores=num_cores,
            windows=tuple(windows),
            num_answers=self._num_answers,
            rss_mb={name: tuple(readings) for name, readings in rss_mb.items()},
        )

    async def _window(
        self,
        pace: float,
        seconds: float,
        streams: list[asyncio.Task[None]],
        rss_mb: dict[str, list[float]],
        show: Callable[[int, int], object],
        *,
        is_only: bool,
    ) -> Window:
        began = self._count()
        num_readings = _NUM_READINGS if is_only else 1
        for reading in range(num_readings):
            await self._sleep(seconds / num_readings, streams)
            for name, rss_bytes in self._running.rss_bytes().items():
                rss_mb.setdefault(name, []).append(rss_bytes / 1e6)
            if is_only:
                show(reading + 1, num_readings)
        return _between(pace, began, self._count())

    async def _stream(self, number: int) -> None:
        """Ask, read, ask again."""
        draw = random.Random(number)
        while True:
            ask = _ask(draw)
            sample = self._open[number] = Sample(due_s=time.perf_counter())
            await self._target.ask(ask, sample)
            if sample.error:
                raise UnavailableError(f"a stream failed: {sample.error}")
            self._num_events += self._open.pop(number).num_events
            self._num_answers += 1

    async def _sleep(self, seconds: float, streams: list[asyncio.Task[None]]) -> None:
        """UnavailableError: a stream has failed meanwhile."""
        done, _ = await asyncio.wait(streams, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
        for stream in done:
            stream.result()

    def _count(self) -> _Count:
        num_open = sum(sample.num_events for sample in self._open.values())
        cpu_s = self._running.cpu_s() | {"clients": time.process_time()}
        return _Count(time.perf_counter(), self._num_events + num_open, self._running.num_made, cpu_s)


def _between(pace: float, began: _Count, ended: _Count) -> Window:
    num_events = max(ended.num_events - began.num_events, 1)
    return Window(
        pace_per_s=pace,
        events_per_s=num_events / (ended.at_s - began.at_s),
        tokens_per_event=(ended.num_made - began.num_made) / num_events,
        us_per_event={
            name: 1e6 * (cpu_s - began.cpu_s[name]) / num_events for name, cpu_s in ended.cpu_s.items()
        },
    )


def _search(first: float) -> Iterator[float]:
    pace = first
    while True:
        yield pace
        pace *= _MORE


def _ask(draw: random.Random) -> Ask:
    """Of differing length, so that they do not all end in one step."""
    return next(made_up(_INPUT_LEN, draw.randint(*_OUTPUT_LENS), draw.getrandbits(32)))


def _pace(window: Window) -> float:
    return window.pace_per_s
