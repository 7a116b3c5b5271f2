"""How fast a count grows, and when it will be complete: of bytes that are loaded, for one. Pure."""

from __future__ import annotations

from collections import deque


class Pace:
    """The rate over the last `window_s`: the whole time says too little of a load that slows down.

    Counts never fall and times never go back; a count that starts anew needs a new `Pace`.
    """

    def __init__(self, window_s: float = 15.0) -> None:
        self._window_s = window_s
        self._seen: deque[tuple[float, int]] = deque()

    def note(self, count: int, now_s: float) -> None:
        """The count so far. The oldest one kept is the last from before the window."""
        self._seen.append((now_s, count))
        while len(self._seen) > 2 and self._seen[1][0] <= now_s - self._window_s:
            self._seen.popleft()

    @property
    def per_s(self) -> float | None:
        """None until time has passed between two counts."""
        if not self._seen:
            return None
        (first_s, first), (last_s, last) = self._seen[0], self._seen[-1]
        return (last - first) / (last_s - first_s) if last_s > first_s else None

    def eta_s(self, total: int) -> float | None:
        """Seconds from the last count to `total`; None while nobody can tell."""
        rate = self.per_s
        if not self._seen or self._seen[-1][1] >= total:
            return 0.0 if self._seen else None
        return (total - self._seen[-1][1]) / rate if rate else None
