"""How far one rank's load is, told to whoever wants to know."""

from __future__ import annotations

from collections.abc import Callable

from k2dist.messages import RankProgress

Tell = Callable[[RankProgress], object]


class LoadProgress:
    """Of a shard of `num_bytes`. The methods have the form of `load_shard`'s and `self_test`'s callbacks."""

    def __init__(self, num_bytes: int, tell: Tell | None) -> None:
        self._num_bytes = num_bytes
        self._tell = tell

    def loaded(self, num_bytes_loaded: int, _: int) -> None:
        self._say(num_bytes_loaded, 0)

    def tested(self, num_bytes_tested: int, _: int) -> None:
        self._say(self._num_bytes, num_bytes_tested)

    def _say(self, num_bytes_loaded: int, num_bytes_tested: int) -> None:
        if self._tell is not None:
            self._tell(
                RankProgress(
                    num_bytes=self._num_bytes,
                    num_bytes_loaded=num_bytes_loaded,
                    num_bytes_tested=num_bytes_tested,
                )
            )
