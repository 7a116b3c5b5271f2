"""What clients of a server waited for, and what it gave them: percentiles of many requests. Pure."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from k2dist.bench.percentiles import Percentiles
from k2dist.messages import Message


@dataclass(slots=True, kw_only=True)
class Sample:
    """One request as its client saw it; times in seconds of one clock, 0 where they did not come.

    due_s: when it was to be sent. Later sending is part of the wait, or a slow server would be asked less and
    look faster than it is. gap_s: between neighbouring events that brought something.
    """

    due_s: float
    first_s: float = 0.0
    last_s: float = 0.0
    ended_s: float = 0.0
    num_events: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    gap_s: array[float] = field(default_factory=lambda: array("f"))
    error: str = ""

    def note(self, now_s: float) -> None:
        """An event that brought something."""
        if self.num_events:
            self.gap_s.append(now_s - self.last_s)
        else:
            self.first_s = now_s
        self.last_s = now_s
        self.num_events += 1


class ServeReport(Message, frozen=True, kw_only=True):
    """Of requests that ended well, but for the counts.

    token_ms: of each answer, from its first token to its end, over the tokens after the first. event_ms: what
    a reader sees: between two events, which may bring several tokens each.
    """

    url: str
    seconds: float  # from the first request to the end of the last answer
    num_requests: int
    num_failed: int
    errors: dict[str, int]  # message -> how often
    prompt_tokens: int
    completion_tokens: int
    requests_per_s: float
    prompt_tokens_per_s: float
    completion_tokens_per_s: float
    tokens_per_event: float
    first_ms: Percentiles
    event_ms: Percentiles
    token_ms: Percentiles
    whole_ms: Percentiles


def summarise(url: str, samples: Iterable[Sample]) -> ServeReport:
    """At least one sample."""
    every = list(samples)
    good = [sample for sample in every if not sample.error]
    seconds = max(sample.ended_s for sample in every) - min(sample.due_s for sample in every)
    gap_s = [gap_s for sample in good for gap_s in sample.gap_s]
    prompt_tokens = sum(sample.prompt_tokens for sample in good)
    completion_tokens = sum(sample.completion_tokens for sample in good)
    return ServeReport(
        url=url,
        seconds=seconds,
        num_requests=len(every),
        num_failed=len(every) - len(good),
        errors=dict(Counter(sample.error for sample in every if sample.error).most_common()),
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        requests_per_s=len(good) / seconds,
        prompt_tokens_per_s=prompt_tokens / seconds,
        completion_tokens_per_s=completion_tokens / seconds,
        tokens_per_event=completion_tokens / max(sum(sample.num_events for sample in good), 1),
        first_ms=Percentiles.of([1e3 * (one.first_s - one.due_s) for one in good if one.num_events]),
        event_ms=Percentiles.of(1e3 * np.asarray(gap_s)),  # type: ignore[arg-type]
        token_ms=Percentiles.of([1e3 * _per_token_s(one) for one in good if one.completion_tokens > 1]),
        whole_ms=Percentiles.of([1e3 * (one.ended_s - one.due_s) for one in good]),
    )


def _per_token_s(sample: Sample) -> float:
    return (sample.last_s - sample.first_s) / (sample.completion_tokens - 1)
