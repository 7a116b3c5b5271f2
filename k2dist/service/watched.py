"""Files that may change while they are used: certificates, keys. What cannot be read leaves the old in
force."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from k2dist.errors import ConfigError

T = TypeVar("T")
Stamp = tuple[tuple[int, int, int] | None, ...]
_LOOK_S = 1.0  # between two looks at the files
_log = logging.getLogger(__name__)


class Watched(Generic[T]):
    """What `read` makes of `paths`, read again when one of them has changed; for any thread.

    `read` raises ConfigError that names the file. The first time that goes to the caller; later the value
    from before stays, and the error is logged once for each change. A file that is replaced (as Kubernetes
    replaces a mounted secret, by a symbolic link) has changed too. Pairs of files that change one after the
    other are read again until they fit.
    """

    def __init__(
        self,
        paths: Sequence[str],
        read: Callable[[], T],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._paths = tuple(paths)
        self._read = read
        self._clock = clock
        self._lock = threading.Lock()
        self._stamp = self._look()  # before reading: what changes meanwhile is read again
        self._value = read()
        self._next_look_s = clock() + _LOOK_S

    def current(self) -> T:
        with self._lock:
            now_s = self._clock()
            if now_s >= self._next_look_s:
                self._next_look_s = now_s + _LOOK_S
                self._read_again()
            return self._value

    def _read_again(self) -> None:
        stamp = self._look()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._value = self._read()
        except ConfigError as error:
            _log.error("watched.not_reloaded what was there before stays in force: %s", error)
        else:
            _log.warning("watched.reloaded %s", " ".join(self._paths))

    def _look(self) -> Stamp:
        return tuple(_stamp(path) for path in self._paths)


def _stamp(path: str) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size
