"""What a simulation found: rates, percentiles, and how they went over time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from k2dist.messages import Message

BUCKETS = 240  # of the curves over time


class Percentiles(Message, frozen=True, kw_only=True):
    """Seconds; the nearest rank of the sorted values. All 0 where there are none."""

    p50: float
    p90: float
    p95: float
    p99: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Percentiles:
        ordered = sorted(values) or [0.0]

        def at(share: float) -> float:
            return ordered[max(math.ceil(share * len(ordered)), 1) - 1]

        return cls(p50=at(0.5), p90=at(0.9), p95=at(0.95), p99=at(0.99), most=ordered[-1])


class Moment(Message, frozen=True, kw_only=True):
    """A stretch of time that ends at `at_s`; levels are those at its end."""

    at_s: float
    output_tokens_per_s: float
    prompt_tokens_per_s: float
    num_running: int
    num_waiting: int
    pages_used: float  # of all pages, 0 to 1
    step_s: float  # mean


class LossReport(Message, frozen=True, kw_only=True):
    """`pause_s`: no lane stepped. `lane_back_s`: when the lost lane took requests again, by the clock."""

    world_rank: int
    lane: int | None
    at_s: float
    pause_s: float
    lane_back_s: float
    num_readmitted: int
    num_tokens_recomputed: int


class SimulationReport(Message, frozen=True, kw_only=True):
    """`cached_share`: of all prompt tokens, those that were found in the cache. `binding`: share of the
    stepping time, by what bound."""

    num_requests: int
    num_finished: int
    num_refused: int
    num_steps: int
    duration_s: float  # by the virtual clock
    idle_s: float
    output_tokens_per_s: float
    prompt_tokens_per_s: float  # computed, cached ones not included
    ttft_s: Percentiles
    tpot_s: Percentiles
    whole_s: Percentiles
    step_s: Percentiles
    num_preempted: int
    cached_share: float
    most_running: int
    most_waiting: int
    imbalance: float
    binding: dict[str, float]
    loss: LossReport | None
    ttfts_s: tuple[float, ...]  # a thousand quantiles at most, for curves
    tpots_s: tuple[float, ...]
    moments: tuple[Moment, ...]


@dataclass(slots=True)
class Tally:
    """What is noted while a simulation runs."""

    ttfts_s: list[float] = field(default_factory=list)
    tpots_s: list[float] = field(default_factory=list)
    wholes_s: list[float] = field(default_factory=list)
    steps: list[tuple[float, float, int, int, int, int, float]] = field(default_factory=list)
    binding_s: dict[str, float] = field(default_factory=dict)
    num_preempted: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    idle_s: float = 0.0

    def step(
        self,
        *,
        end_s: float,
        step_s: float,
        outputs: int,
        prompts: int,
        running: int,
        waiting: int,
        pages_used: float,
        binding: str,
    ) -> None:
        self.steps.append((end_s, step_s, outputs, prompts, running, waiting, pages_used))
        self.binding_s[binding] = self.binding_s.get(binding, 0.0) + step_s

    def moments(self) -> tuple[Moment, ...]:
        """At most `BUCKETS` stretches of equal time."""
        if not self.steps:
            return ()
        width_s = self.steps[-1][0] / BUCKETS
        found: list[Moment] = []
        first, began_s = 0, 0.0
        ends_s = [step[0] for step in self.steps]
        for index, end_s in enumerate(ends_s):
            if end_s >= began_s + width_s or index == len(self.steps) - 1:
                found.append(_moment(self.steps[first : index + 1], began_s))
                first, began_s = index + 1, end_s
        return tuple(found)


def quantiles(values: Sequence[float], most: int = 1000) -> tuple[float, ...]:
    ordered = sorted(values)
    if len(ordered) <= most:
        return tuple(ordered)
    return tuple(ordered[index * (len(ordered) - 1) // (most - 1)] for index in range(most))


def _moment(steps: list[tuple[float, float, int, int, int, int, float]], began_s: float) -> Moment:
    end_s, _, _, _, running, waiting, pages_used = steps[-1]
    elapsed_s = max(end_s - began_s, 1e-9)
    return Moment(
        at_s=end_s,
        output_tokens_per_s=sum(step[2] for step in steps) / elapsed_s,
        prompt_tokens_per_s=sum(step[3] for step in steps) / elapsed_s,
        num_running=running,
        num_waiting=waiting,
        pages_used=pages_used,
        step_s=sum(step[1] for step in steps) / len(steps),
    )
