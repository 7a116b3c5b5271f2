"""How a cluster comes up, on stderr: bars on a terminal, lines elsewhere, nothing with --json.

While ranks load, and then while they test what they hold: bytes, rate, and the time left.
"""

from __future__ import annotations

import sys
import time
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from k2dist.cluster.status import ClusterStatus
from k2dist.observe.pace import Pace
from k2dist.observe.work import Work, work_line, work_of

LINE_S = 5.0  # between two lines about loading or testing

_STAGES = {
    "new": "starting the supervisor",
    "placing": "placing the ranks",
    "building": "ranks start, load their shards, and test them",
    "joining": "ranks join each other",
    "running": "opening the service",
    "draining": "draining",
    "stopping": "stopping the ranks",
    "removing": "stopping the ranks",
    "stopped": "stopped",
}


class StartProgress:
    """Shows a start as it goes; a context, so that the terminal is left as it was. This one shows nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def stage(self, text: str) -> None:
        """A new stage begins."""

    def note(self, text: str) -> None:
        """A line that stays."""

    def show(self, status: ClusterStatus) -> None:
        """How far the cluster is."""


def start_progress(*, is_quiet: bool) -> StartProgress:
    if is_quiet:
        return StartProgress()
    return _Bars() if sys.stderr.isatty() else _Lines()


class _Lines(StartProgress):
    """A line with the seconds since the start for each stage, one now and then about all that is loaded, or
    tested, and one when a rank is ready."""

    def __init__(self) -> None:
        self._started_s = time.monotonic()
        self._stage = ""
        self._ready: set[int] = set()
        self._pace = Pace()
        self._work = Work("loaded", 0, 0)
        self._line_s = self._started_s

    def stage(self, text: str) -> None:
        if text != self._stage:
            self._stage = text
            self._say(text)

    def note(self, text: str) -> None:
        self._say(text)

    def show(self, status: ClusterStatus) -> None:
        for rank in status.ranks:
            if rank.state in ("ready", "joined") and rank.world_rank not in self._ready:
                self._ready.add(rank.world_rank)
                self._say(f"rank {rank.world_rank} has loaded and tested {rank.progress.num_bytes:,} bytes")
        self.stage(_STAGES[status.phase])
        self._show_work(work_of([rank.progress for rank in status.ranks]), time.monotonic())

    def _show_work(self, work: Work, now_s: float) -> None:
        if work.what != self._work.what or work.done < self._work.done:  # a rank was replaced and loads anew
            self._pace = Pace()
        self._work = work
        self._pace.note(work.done, now_s)
        if work.done < work.total and now_s >= self._line_s + LINE_S:
            self._line_s = now_s
            self._say(work_line(work, self._pace))

    def _say(self, text: str) -> None:
        print(f"[{time.monotonic() - self._started_s:5.1f} s] {text}", file=sys.stderr, flush=True)


class _Bars(StartProgress):
    """A spinner with the stage, and a bar for each rank that loads, and then tests."""

    def __init__(self) -> None:
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._stage = self._progress.add_task("starting", total=None)
        self._bars: dict[tuple[int, str], TaskID] = {}

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def stage(self, text: str) -> None:
        self._progress.update(self._stage, description=text)

    def note(self, text: str) -> None:
        self._progress.console.print(text, highlight=False)

    def show(self, status: ClusterStatus) -> None:
        self.stage(_STAGES[status.phase])
        for rank in status.ranks:
            work = work_of([rank.progress])
            if work.total == 0:
                continue
            if not work.is_bytes:
                self.stage(f"{_STAGES[status.phase]}: rank {rank.world_rank} {work_line(work, Pace())}")
                continue
            if (rank.world_rank, work.what) not in self._bars:
                earlier = self._bars.pop((rank.world_rank, "loaded"), None)
                if earlier is not None:  # a new bar, so that the rate is of the test alone
                    self._progress.remove_task(earlier)
                name = f"  rank {rank.world_rank} {work.what}"
                self._bars[rank.world_rank, work.what] = self._progress.add_task(name)
            bar = self._bars[rank.world_rank, work.what]
            self._progress.update(bar, completed=work.done, total=work.total)
