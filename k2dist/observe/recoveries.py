"""How often a world was rebuilt, and for how long nothing ran meanwhile. Pure.

running in generation 1 ... not running ............. running in generation 2
                            |<-- one recovery ------->|
"""

from __future__ import annotations

from k2dist.messages import Message


class RecoveryFacts(Message, frozen=True, kw_only=True):
    """Since the supervisor began."""

    num_recoveries: int = 0
    total_s: float = 0.0  # of all of them together
    last_s: float = 0.0  # of the last one
    under_way_s: float = 0.0  # 0: none is


class Recoveries:
    """Told of every change of the world. The first start is none, nor is an end."""

    def __init__(self) -> None:
        self._generation: int | None = None  # the last that ran
        self._broke_s: float | None = None
        self._num = 0
        self._total_s = 0.0
        self._last_s = 0.0

    def note(self, generation: int, now_s: float, *, is_running: bool, is_ending: bool) -> None:
        """The world is as given now; times never go back."""
        if is_ending:
            self._broke_s = None
        elif is_running:
            if self._broke_s is not None:
                self._last_s = now_s - self._broke_s
                self._total_s += self._last_s
                self._num += 1
                self._broke_s = None
            self._generation = generation
        elif self._generation is not None and self._broke_s is None:
            self._broke_s = now_s

    def facts(self, now_s: float) -> RecoveryFacts:
        return RecoveryFacts(
            num_recoveries=self._num,
            total_s=self._total_s,
            last_s=self._last_s,
            under_way_s=0.0 if self._broke_s is None else now_s - self._broke_s,
        )
