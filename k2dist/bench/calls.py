"""How soon a rank that steps answers the coordinator, and what its answers cost the steps.

admit, cancel      of a request of its own each, as a coordinator calls them
cost               of a step with such calls going on, over one without: calls that change nothing (a request
                   that is known, an id that is not), so that no rows are added
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import ray

from k2dist.bench.percentiles import Percentiles
from k2dist.bench.waits import in_ms
from k2dist.ids import RequestId
from k2dist.messages import Message, Request, Sampling

CALLS_PER_S = 20.0  # what a lane with an answer of 100 tokens at 30 ms each, 60 at a time, is asked


class CallCost(Message, frozen=True, kw_only=True):
    """While all lanes decode."""

    admit_ms: Percentiles
    cancel_ms: Percentiles
    step_ms: float  # without calls, the median of the windows
    step_ms_with_calls: float
    calls_per_s: float  # of each kind, in the windows with calls

    @property
    def cost_ratio(self) -> float:
        return self.step_ms_with_calls / self.step_ms


def call_waits(lane: Any, num_samples: int, note: Callable[[], None]) -> tuple[Percentiles, Percentiles]:
    """`lane`: the actor of its first rank, which decodes meanwhile."""
    admits_s, cancels_s = [], []
    for number in range(num_samples):
        began_s = time.monotonic()
        request = _request(f"bench-{began_s}-{number}", max_tokens=64)
        ray.get(lane.admit.remote((request,)))
        admitted_s = time.monotonic()
        ray.get(lane.cancel.remote((request.request_id,)))
        cancels_s.append(time.monotonic() - admitted_s)
        admits_s.append(admitted_s - began_s)
        note()
        time.sleep(1 / CALLS_PER_S)
    return in_ms(admits_s), in_ms(cancels_s)


def step_cost(lane: Any, window_s: float, num_windows: int, note: Callable[[], None]) -> tuple[float, float]:
    """Milliseconds of a step without and with calls, in turn; medians."""
    known = _request(f"bench-known-{time.monotonic()}", max_tokens=1)
    ray.get(lane.admit.remote((known,)))
    without: list[float] = []
    with_calls: list[float] = []
    for _ in range(num_windows):
        for found, has_calls in ((without, False), (with_calls, True)):
            found.append(_step_ms(lane, window_s, known if has_calls else None))
            note()
    return median(without), median(with_calls)


def _step_ms(lane: Any, window_s: float, known: Request | None) -> float:
    before, until_s = ray.get(lane.stats.remote()), time.monotonic() + window_s
    while (now_s := time.monotonic()) < until_s:
        if known is not None:
            ray.get([lane.admit.remote((known,)), lane.cancel.remote((RequestId("nobody"),))])
        time.sleep(min(1 / CALLS_PER_S, max(until_s - now_s, 0.0)))
    after = ray.get(lane.stats.remote())
    assert after.num_steps > before.num_steps, "it does not step"
    step_ms: float = 1e3 * (after.step_s_total - before.step_s_total) / (after.num_steps - before.num_steps)
    return step_ms


def _request(name: str, *, max_tokens: int) -> Request:
    sampling = Sampling(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    return Request(request_id=RequestId(name), prompt=(1, 2, 3), sampling=sampling)
