"""How a cluster comes up, on stderr: bars on a terminal, lines elsewhere, nothing with --json.

While ranks load: bytes, rate, and the time left.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Protocol, Self

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

LINE_S = 5.0  # between two lines about loading

_STAGES = {
    "new": "starting the supervisor",
    "placing": "placing the ranks",
    "building": "ranks start and load their shards",
    "joining": "ranks join each other",
    "running": "opening the service",
    "draining": "draining",
    "stopping": "stopping the ranks",
    "removing": "stopping the ranks",
    "stopped": "stopped",
}


class StartProgress(Protocol):
    """Shows a start as it goes; a context, so that the terminal is left as it was."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def stage(self, text: str) -> None:
        """A new stage begins."""

    def show(self, status: ClusterStatus) -> None:
        """How far the cluster is."""


def start_progress(*, is_quiet: bool) -> StartProgress:
    if is_quiet:
        return _Silence()
    return _Bars() if sys.stderr.isatty() else _Lines()


class _Silence:
    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def stage(self, text: str) -> None: ...

    def show(self, status: ClusterStatus) -> None: ...


class _Lines(_Silence):
    """A line with the seconds since the start for each stage, one now and then about all that is loaded, and
    one when a rank has loaded."""

    def __init__(self) -> None:
        self._started_s = time.monotonic()
        self._stage = ""
        self._loaded: set[int] = set()
        self._pace = Pace()
        self._num_bytes_loaded = 0
        self._line_s = self._started_s

    def stage(self, text: str) -> None:
        if text != self._stage:
            self._stage = text
            self._say(text)

    def show(self, status: ClusterStatus) -> None:
        for rank in status.ranks:
            if rank.state in ("ready", "joined") and rank.world_rank not in self._loaded:
                self._loaded.add(rank.world_rank)
                self._say(f"rank {rank.world_rank} has loaded {rank.num_bytes:,} bytes")
        self.stage(_STAGES[status.phase])
        self._show_load(status, time.monotonic())

    def _show_load(self, status: ClusterStatus, now_s: float) -> None:
        done = sum(rank.num_bytes_loaded for rank in status.ranks)
        total = sum(rank.num_bytes for rank in status.ranks)
        if done < self._num_bytes_loaded:  # a rank was replaced and loads anew
            self._pace = Pace()
        self._num_bytes_loaded = done
        self._pace.note(done, now_s)
        if done < total and now_s >= self._line_s + LINE_S:
            self._line_s = now_s
            self._say(load_line(done, total, self._pace))

    def _say(self, text: str) -> None:
        print(f"[{time.monotonic() - self._started_s:5.1f} s] {text}", file=sys.stderr, flush=True)


def load_line(done: int, total: int, pace: Pace) -> str:
    """Bytes of all ranks; the rate and the time left once they can be told."""
    text = f"loaded {done / 1e9:.2f} of {total / 1e9:.2f} GB"
    rate, eta_s = pace.per_s, pace.eta_s(total)
    return text if rate is None or eta_s is None else f"{text}, {rate / 1e9:.2f} GB/s, {eta_s:.0f} s left"


class _Bars:
    """A spinner with the stage, and a bar for each rank that loads."""

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
        self._bars: dict[int, TaskID] = {}

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def stage(self, text: str) -> None:
        self._progress.update(self._stage, description=text)

    def show(self, status: ClusterStatus) -> None:
        self.stage(_STAGES[status.phase])
        for rank in status.ranks:
            if rank.num_bytes == 0:
                continue
            if rank.world_rank not in self._bars:
                self._bars[rank.world_rank] = self._progress.add_task(f"  rank {rank.world_rank}")
            bar = self._bars[rank.world_rank]
            self._progress.update(bar, completed=rank.num_bytes_loaded, total=rank.num_bytes)
