"""How far one rank's load is, and how long its parts took, told to whoever wants to know."""

from __future__ import annotations

import time
from collections.abc import Callable

from msgspec.structs import replace

from k2dist.messages import RankProgress

Tell = Callable[[RankProgress], object]


class LoadProgress:
    """Of a shard of `num_bytes`; its clock starts with it. The methods have the form of `load_shard`'s,
    `self_test`'s and `warm_up`'s callbacks."""

    def __init__(
        self, num_bytes: int, tell: Tell | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._tell = tell
        self._clock = clock
        self._started_s = clock()
        self._first_s: float | None = None
        self._now = RankProgress(num_bytes=num_bytes)

    def loaded(self, num_bytes_loaded: int, _: int) -> None:
        now_s = self._clock()
        if self._first_s is None:
            self._first_s = now_s
        self._say(
            num_bytes_loaded=num_bytes_loaded,
            find_s=self._first_s - self._started_s,
            read_s=now_s - self._first_s,
        )

    def tested(self, num_bytes_tested: int, _: int) -> None:
        self._say(num_bytes_loaded=self._now.num_bytes, num_bytes_tested=num_bytes_tested)

    def warmed(self, num_sizes_warm: int, num_sizes: int) -> None:
        self._say(num_sizes_warm=num_sizes_warm, num_sizes=num_sizes)

    def _say(self, **news: float) -> None:
        self._now = replace(self._now, **news)
        if self._tell is not None:
            self._tell(self._now)
