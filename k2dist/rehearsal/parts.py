"""A step's time, cut into parts that follow one another: each moment belongs to exactly one of them.

    host | embedding | attention  router  dispatch  experts  combine  shared | ... | head | sample | host
                               cut      cut       cut      cut      cut    cut

A cut says which part has just ended. On a CPU a cut is the clock's reading; on CUDA it is an event in the
stream, so that a part's time is the device's, idle gaps of that part included, and the host never waits.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch

from k2dist.planner.work import Part


class Clock(Protocol):
    """`name`: how it tells time, for the report."""

    name: str

    def mark(self) -> object:
        """This moment."""
        ...

    def elapsed_s(self, marks: Sequence[object]) -> list[float]:
        """Between each mark and the next."""
        ...


class HostClock:
    name = "host clock"

    def mark(self) -> object:
        return time.perf_counter()

    def elapsed_s(self, marks: Sequence[object]) -> list[float]:
        times_s = [mark for mark in marks if isinstance(mark, float)]
        return [after - before for before, after in pairwise(times_s)]


class CudaClock:
    name = "CUDA events"

    def mark(self) -> object:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def elapsed_s(self, marks: Sequence[object]) -> list[float]:
        events = [mark for mark in marks if isinstance(mark, torch.cuda.Event)]
        events[-1].synchronize()
        return [before.elapsed_time(after) / 1e3 for before, after in pairwise(events)]


def clock_of(device: torch.device) -> Clock:
    return CudaClock() if device.type == "cuda" else HostClock()


_BEFORE_ASIDE, _ASIDE = "before aside", "aside"


class Stopwatch:
    """Seconds of each part of one step. What happens `aside` is in no part."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self._marks: list[object] = []
        self._ended: list[Part | str] = []  # what each mark but the first ended
        self._is_aside = False

    def start(self) -> None:
        """A step begins; what the last one took is forgotten."""
        self._ended = []
        self._marks = [self.clock.mark()]

    def cut(self, part: Part) -> None:
        """What went on since the last cut was `part`. Nothing before the first `start`."""
        assert not self._is_aside, f"{part} ends while peers are made up"
        self._mark(part)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What goes on meanwhile is not the rank's; the part in which it happens goes on after it."""
        self._mark(_BEFORE_ASIDE)
        self._is_aside = True
        yield
        self._is_aside = False
        self._mark(_ASIDE)

    def times_s(self) -> StepTimes:
        """Of the step since `start`. Waits for the device."""
        parts = dict.fromkeys(Part, 0.0)
        aside_s = open_s = 0.0
        for ended, elapsed_s in zip(self._ended, self.clock.elapsed_s(self._marks), strict=True):
            if isinstance(ended, Part):
                parts[ended] += open_s + elapsed_s
                open_s = 0.0
            elif ended == _BEFORE_ASIDE:
                open_s += elapsed_s
            else:
                aside_s += elapsed_s
        assert open_s == 0.0, "a step ends with a cut"
        return StepTimes(parts, aside_s)

    def _mark(self, ended: Part | str) -> None:
        if self._marks:
            self._ended.append(ended)
            self._marks.append(self.clock.mark())


@dataclass(frozen=True, slots=True)
class StepTimes:
    """`aside_s`: for making up peers; in no part."""

    parts: dict[Part, float]
    aside_s: float

    @property
    def step_s(self) -> float:
        return sum(self.parts.values())
