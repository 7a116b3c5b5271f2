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
from pathlib import Path

from k2dist.messages import Message

PIECE_BYTES = 16 * 2**20
NUM_THREADS = 8
_PAGE_BYTES = mmap.PAGESIZE


class DiskRate(Message, frozen=True, kw_only=True):
    """What was read, and how: "direct" past the page cache, or "cold" through it after it was emptied."""

    num_bytes: int
    wall_s: float
    how: str

    @property
    def bytes_per_s(self) -> float:
        return self.num_bytes / self.wall_s


def measure_disk(
    paths: Sequence[Path], *, max_bytes: int | None = None, max_s: float | None = None
) -> DiskRate:
    """Read `paths` from their beginnings, one after the other, `NUM_THREADS` pieces at a time, until all is
    read, or so much, or so long. File systems without direct reads (tmpfs, some of networks) are read
    through the cache, from which the files are dropped first. Errors: OSError."""
    assert paths, "nothing to read"
    is_direct = _reads_direct(paths[0])
    if not is_direct:
        evict(paths)
    flags = os.O_RDONLY | os.O_CLOEXEC | (os.O_DIRECT if is_direct else 0)
    files = [os.open(path, flags) for path in paths]
    try:
        began_s = time.monotonic()
        give_up_s = None if max_s is None else began_s + max_s
        num_bytes = _read_all(_pieces(files, max_bytes), give_up_s)
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


def _pieces(files: Sequence[int], max_bytes: int | None) -> Iterator[tuple[int, int]]:
    """File and offset of each piece, in order."""
    num_bytes = 0
    for file in files:
        size = os.fstat(file).st_size
        for offset in range(0, size, PIECE_BYTES):
            if max_bytes is not None and num_bytes >= max_bytes:
                return
            num_bytes += min(PIECE_BYTES, size - offset)
            yield file, offset


def _read_all(pieces: Iterator[tuple[int, int]], give_up_s: float | None) -> int:
    """Threads take the next piece each; bytes read by all."""
    lock = threading.Lock()

    def take() -> tuple[int, int] | None:
        with lock:
            if give_up_s is not None and time.monotonic() >= give_up_s:
                return None
            return next(pieces, None)

    def read() -> int:
        num_bytes = 0
        with mmap.mmap(-1, PIECE_BYTES) as buffer:  # page-aligned, as direct reads ask
            while (piece := take()) is not None:
                num_bytes += os.preadv(piece[0], [buffer], piece[1])
        return num_bytes

    with ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="disk") as pool:
        return sum(pool.map(lambda _: read(), range(NUM_THREADS)))


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
