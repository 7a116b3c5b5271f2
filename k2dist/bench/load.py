"""How fast the ranks of one machine read their shards from a cold disk, beside what that disk can do.

    evict ─> direct reads of the same files, several at a time, by each of `READERS`: the best is the ceiling
    evict ─> every rank's process reads its shard, all at once, as `serve` does
    (again, in turns; the best of each counts: what disturbs a disk only ever slows it)

Eviction is posix_fadvise(DONTNEED) on the model's files: it needs no root, and leaves other programs their
cache; mincore(2) then says how much stayed. A process counts what it took from storage (/proc/self/io): bytes
that several ranks want come from the disk once and then from the cache, and only the first counts.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

from k2dist.errors import CheckpointError, PeerError
from k2dist.messages import Message
from k2dist.parallel import ShardPlan
from k2dist.probe.disk import READERS, DiskRate, Reader, cached_share, evict, measure_disk

START_S = 120.0  # for the processes to import torch, and for one read of a shard at 0.5 GB/s
_CACHED_MOST = 0.1  # of the files, when the ranks begin; with more it is memory that is measured
_IO = Path("/proc/self/io")


class LoadRates(Message, frozen=True, kw_only=True):
    """The best round of each. `cached_share`: of the files' pages, in memory when the ranks began."""

    model: str
    num_ranks: int
    num_rounds: int
    file_bytes: int
    ceiling_how: str  # as in DiskRate
    ceiling_reader: str  # the best of `READERS`
    ceiling_bytes_per_s: float
    num_bytes: int  # of all shards together
    disk_bytes: int
    cached_share: float
    wall_s: float  # from the first rank's first byte to the last rank's last
    find_s: float  # index and headers, of the slowest rank

    @property
    def disk_bytes_per_s(self) -> float:
        return self.disk_bytes / self.wall_s

    @property
    def share(self) -> float:
        """Of the ceiling."""
        return self.disk_bytes_per_s / self.ceiling_bytes_per_s


class _RankRead(NamedTuple):
    """One rank's read. Times are of a clock that all processes of a machine share."""

    num_bytes: int
    disk_bytes: int
    find_s: float
    began_s: float
    ended_s: float


class _Round(NamedTuple):
    reads: tuple[_RankRead, ...]
    cached_share: float

    @property
    def wall_s(self) -> float:
        return max(read.ended_s for read in self.reads) - min(read.began_s for read in self.reads)

    @property
    def disk_bytes(self) -> int:
        return sum(read.disk_bytes for read in self.reads)


def measure(
    model_dir: Path,
    plans: Sequence[ShardPlan],
    *,
    num_rounds: int,
    note: Callable[[], object] = lambda: None,
) -> LoadRates:
    """Read `plans`, a process each. `note` is called after each of the `num_reads(num_rounds)`.

    Errors: CheckpointError if there is no such model, or its files stay in memory; PeerError.
    """
    files = sorted(model_dir.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{model_dir}: no safetensors file in it")
    disks: list[tuple[DiskRate, Reader]] = []
    rounds: list[_Round] = []
    with _readers(model_dir, plans) as readers:
        for _ in range(num_rounds):
            for reader in READERS:
                evict(files)
                disks.append((measure_disk(files, reader), reader))
                note()
            evict(files)
            cached = cached_share(files)
            if cached > _CACHED_MOST:
                raise CheckpointError(
                    f"{model_dir}: {cached:.0%} of it stays in memory, so its disk cannot be measured: it "
                    f"lies in memory, or a process maps it; end that, or give a copy on a disk"
                )
            rounds.append(_Round(_read_all(readers), cached))
            note()
    disk, reader = max(disks, key=lambda pair: pair[0].bytes_per_s)
    best = max(rounds, key=lambda each: each.disk_bytes / each.wall_s)
    return LoadRates(
        model=str(model_dir),
        num_ranks=len(plans),
        num_rounds=num_rounds,
        file_bytes=sum(path.stat().st_size for path in files),
        ceiling_how=disk.how,
        ceiling_reader=str(reader),
        ceiling_bytes_per_s=disk.bytes_per_s,
        num_bytes=sum(read.num_bytes for read in best.reads),
        disk_bytes=best.disk_bytes,
        cached_share=best.cached_share,
        wall_s=best.wall_s,
        find_s=max(read.find_s for read in best.reads),
    )


def num_reads(num_rounds: int) -> int:
    """Of the disk by each reader, and of all ranks together."""
    return num_rounds * (len(READERS) + 1)


@contextmanager
def _readers(model_dir: Path, plans: Sequence[ShardPlan]) -> Iterator[list[Connection]]:
    """A process for each plan that reads its shard whenever it is told to; all are ready."""
    context = multiprocessing.get_context("spawn")  # a fork of a process with torch's threads may hang
    pipes = [context.Pipe() for _ in plans]
    processes = [
        context.Process(target=_serve_reads, args=(there, model_dir, plan), daemon=True)
        for (_, there), plan in zip(pipes, plans, strict=True)
    ]
    try:
        for process in processes:
            process.start()
        readers = [here for here, _ in pipes]
        for reader in readers:
            _answer(reader)
        yield readers
    finally:
        for process in processes:
            process.kill()
            process.join()
            process.close()


def _read_all(readers: Sequence[Connection]) -> tuple[_RankRead, ...]:
    for reader in readers:
        reader.send("read")
    answers = [_answer(reader) for reader in readers]
    return tuple(answer for answer in answers if answer is not None)


def _answer(reader: Connection) -> _RankRead | None:
    """What a reader says: first nothing, as it is ready, then of each read.

    Errors: CheckpointError, PeerError.
    """
    try:
        if not reader.poll(START_S):
            raise PeerError(f"a process that reads a shard said nothing for {START_S:g} s")
        answer: _RankRead | str | None = reader.recv()
    except EOFError as error:
        raise PeerError("a process that reads a shard is gone: killed, or out of memory") from error
    if isinstance(answer, str):
        raise CheckpointError(answer)
    return answer


def _serve_reads(pipe: Connection, model_dir: Path, plan: ShardPlan) -> None:
    """In a process of its own. One answer when it can begin, then one for each word."""
    from k2dist.checkpoint import CheckpointFiles  # now, and not while it is timed

    pipe.send(None)
    while True:
        pipe.recv()
        try:
            pipe.send(_read(CheckpointFiles, model_dir, plan))
        except CheckpointError as error:
            pipe.send(str(error))


def _read(open_files: type, model_dir: Path, plan: ShardPlan) -> _RankRead:
    asked_s = time.monotonic()
    with open_files(model_dir) as files:
        files.check(plan)
        before, began_s = _storage_bytes(), time.monotonic()
        files.read_all(plan)
        ended_s = time.monotonic()
        disk_bytes = _storage_bytes() - before
    return _RankRead(plan.num_bytes, disk_bytes, began_s - asked_s, began_s, ended_s)


def _storage_bytes() -> int:
    """What this process has made the kernel fetch from storage so far (proc(5), read_bytes)."""
    fields = dict(line.split(": ") for line in _IO.read_text().splitlines())
    return int(fields["read_bytes"])
