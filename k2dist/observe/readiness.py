"""The time from a command to a cluster that serves, stage by stage. Pure: every time is an argument."""

from __future__ import annotations

from collections.abc import Sequence

from k2dist.messages import LoadSeconds, Message, RankProgress

_PARTS = (
    ("find_s", "found"),
    ("read_s", "read"),
    ("lay_out_s", "laid out"),
    ("test_s", "tested"),
    ("warm_s", "warmed up"),
    ("record_s", "recorded"),
)
_ONLY_WHERE_RECORDED = frozenset({"warm_s", "record_s"})


class Stage(Message, frozen=True, kw_only=True):
    name: str
    wall_s: float


class Readiness(Message, frozen=True, kw_only=True):
    """`slowest`: of each part of loading, the rank that took longest; None if no rank has told."""

    total_s: float
    stages: tuple[Stage, ...]
    slowest: LoadSeconds | None

    def __str__(self) -> str:
        stages = ", ".join(f"{stage.name} {stage.wall_s:.1f}" for stage in self.stages)
        text = f"ready in {self.total_s:.1f} s: {stages}"
        if self.slowest is None:
            return text
        took_s = {word: getattr(self.slowest, field) for field, word in _shown(self.slowest)}
        parts = ", ".join(f"{word} {seconds:.1f}" for word, seconds in took_s.items())
        return f"{text}; of loading, the slowest rank of each: {parts}"


def _shown(seconds: LoadSeconds) -> list[tuple[str, str]]:
    if seconds.warm_s > 0.0:
        return list(_PARTS)
    return [(field, word) for field, word in _PARTS if field not in _ONLY_WHERE_RECORDED]


class StageClock:
    """Which stage a start is in. A stage that is entered again goes on; times never go back."""

    def __init__(self, now_s: float) -> None:
        self._began_s = self._since_s = now_s
        self._stage = ""
        self._took_s: dict[str, float] = {}

    def enter(self, stage: str, now_s: float) -> None:
        if stage != self._stage:
            self._close(now_s)
            self._stage = stage

    def end(self, now_s: float, ranks: Sequence[RankProgress] = ()) -> Readiness:
        self._close(now_s)
        told = [rank.seconds for rank in ranks if rank.seconds is not None]
        slowest = None
        if told:
            slowest = LoadSeconds(
                **{field: max(getattr(each, field) for each in told) for field, _ in _PARTS}
            )
        stages = tuple(Stage(name=name, wall_s=wall_s) for name, wall_s in self._took_s.items())
        return Readiness(total_s=now_s - self._began_s, stages=stages, slowest=slowest)

    def _close(self, now_s: float) -> None:
        if self._stage:
            self._took_s[self._stage] = self._took_s.get(self._stage, 0.0) + now_s - self._since_s
        self._since_s = now_s
