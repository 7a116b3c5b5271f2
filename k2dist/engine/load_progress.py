"""How far one rank's load is, and how long its parts took, told to whoever wants to know."""

from __future__ import annotations

import time
from collections.abc import Callable

from k2dist.messages import RankProgress

Tell = Callable[[RankProgress], object]


class LoadProgress:
    """Of a shard of `num_bytes`; its clock starts with it. The methods have the form of `load_shard`'s and
    `self_test`'s callbacks."""

    def __init__(
        self, num_bytes: int, tell: Tell | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._num_bytes = num_bytes
        self._tell = tell
        self._clock = clock
        self._started_s = clock()
        self._first_s: float | None = None
        self._last_s = self._started_s

    def loaded(self, num_bytes_loaded: int, _: int) -> None:
        self._last_s = self._clock()
        if self._first_s is None:
            self._first_s = self._last_s
        self._say(num_bytes_loaded, 0)

    def tested(self, num_bytes_tested: int, _: int) -> None:
        self._say(self._num_bytes, num_bytes_tested)

    def _say(self, num_bytes_loaded: int, num_bytes_tested: int) -> None:
        if self._tell is None:
            return
        first_s = self._started_s if self._first_s is None else self._first_s
        self._tell(
            RankProgress(
                num_bytes=self._num_bytes,
                num_bytes_loaded=num_bytes_loaded,
                num_bytes_tested=num_bytes_tested,
                find_s=first_s - self._started_s,
                read_s=self._last_s - first_s,
            )
        )
