"""How fast the disk under some files reads: large direct reads, several at a time, past the page cache.

What loads are held against (`k2dist bench load`), and what `k2dist doctor` says of a model's disk.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, zip_longest
from pathlib import Path
from typing import NamedTuple

from k2dist.messages import Message

_PAGE_BYTES = mmap.PAGESIZE


class Reader(NamedTuple):
    """`num_threads`, each of which takes the next piece. `is_spread`: of all files in turns, as if each had a
    job of its own; else one file after the other."""

    num_threads: int
    piece_bytes: int
    is_spread: bool

    def __str__(self) -> str:
        size = f"{self.piece_bytes // 2**20} MiB"
        return f"{self.num_threads} at a time, {size} each{', of all files in turns' * self.is_spread}"


IN_ORDER = Reader(8, 16 * 2**20, is_spread=False)
# No one of them is best on every disk; what it can do is what the best of them reads. 1.6 GB in eight files
# on a virtual disk, GB/s, the better of two: 1.01, 1.01, 1.00; dd with direct reads, one after the other of
# 16 MiB 0.84, eight at once of 1 MiB 0.87; fio with eight jobs, 16 MiB 0.89, 256 KiB and a depth of 8 1.07.
READERS = (IN_ORDER, Reader(8, 2**20, is_spread=True), Reader(32, 2**20, is_spread=True))


class DiskRate(Message, frozen=True, kw_only=True):
    """What was read, and how: "direct" past the page cache, or "cold" through it after it was emptied."""

    num_bytes: int
    wall_s: float
    how: str

    @property
    def bytes_per_s(self) -> float:
        return self.num_bytes / self.wall_s


def measure_disk(
    paths: Sequence[Path],
    reader: Reader = IN_ORDER,
    *,
    max_bytes: int | None = None,
    max_s: float | None = None,
) -> DiskRate:
    """Read `paths` from their beginnings, until all is read, or so much, or so long.

    File systems without direct reads (tmpfs, some of networks) are read through the cache, from which the
    files are dropped first. Errors: OSError.
    """
    assert paths, "nothing to read"
    is_direct = _reads_direct(paths[0])
    if not is_direct:
        evict(paths)
    flags = os.O_RDONLY | os.O_CLOEXEC | (os.O_DIRECT if is_direct else 0)
    files = [os.open(path, flags) for path in paths]
    try:
        began_s = time.monotonic()
        give_up_s = None if max_s is None else began_s + max_s
        num_bytes = _read_all(_pieces(files, reader, max_bytes), reader, give_up_s)
        return DiskRate(
            num_bytes=num_bytes,
            wall_s=time.monotonic() - began_s,
            how="direct" if is_direct else "cold",
        )
    finally:
        for file in files:
            os.close(file)


def evict(paths: Sequence[Path]) -> None:
    """Drop the files' clean pages from the page cache: of these files only, and no rights are needed."""
    for path in paths:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)


def cached_share(paths: Sequence[Path]) -> float:
    """Of the files' pages, those that lie in the page cache: 0 to 1."""
    pages = [_cached_pages(path) for path in paths]
    total = sum(count for _, count in pages)
    return sum(cached for cached, _ in pages) / total if total else 0.0


def _reads_direct(path: Path) -> bool:
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT))
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    return True


def _pieces(files: Sequence[int], reader: Reader, max_bytes: int | None) -> Iterator[tuple[int, int]]:
    """File and offset of each piece, in the reader's order."""
    size = reader.piece_bytes
    ends = {file: os.fstat(file).st_size for file in files}
    of_files = [[(file, offset) for offset in range(0, end, size)] for file, end in ends.items()]
    order = zip_longest(*of_files) if reader.is_spread else of_files
    num_bytes = 0
    for piece in filter(None, chain.from_iterable(order)):
        if max_bytes is not None and num_bytes >= max_bytes:
            return
        file, offset = piece
        num_bytes += min(size, ends[file] - offset)
        yield file, offset


def _read_all(pieces: Iterator[tuple[int, int]], reader: Reader, give_up_s: float | None) -> int:
    """Threads take the next piece each; bytes read by all."""
    lock = threading.Lock()

    def take() -> tuple[int, int] | None:
        with lock:
            if give_up_s is not None and time.monotonic() >= give_up_s:
                return None
            return next(pieces, None)

    def read() -> int:
        num_bytes = 0
        with mmap.mmap(-1, reader.piece_bytes) as buffer:  # page-aligned, as direct reads ask
            while (piece := take()) is not None:
                num_bytes += os.preadv(piece[0], [buffer], piece[1])
        return num_bytes

    with ThreadPoolExecutor(reader.num_threads, thread_name_prefix="disk") as pool:
        return sum(pool.map(lambda _: read(), range(reader.num_threads)))


def _cached_pages(path: Path) -> tuple[int, int]:
    """How many of a file's pages are cached, and how many there are. mincore(2) asks of a mapping, and
    Python's own tells no address for one that may only be read."""
    size = path.stat().st_size
    if size == 0:
        return 0, 0
    count = -(-size // _PAGE_BYTES)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_long,
    )
    libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)
    libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file, 0)
    finally:
        os.close(file)
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), "mmap failed", str(path))
    seen = ctypes.create_string_buffer(count)
    try:
        if libc.mincore(address, size, seen) != 0:
            raise OSError(ctypes.get_errno(), "mincore failed", str(path))
    finally:
        libc.munmap(address, size)
    return sum(byte & 1 for byte in seen.raw), count
