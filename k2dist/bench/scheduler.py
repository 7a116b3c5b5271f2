"""What planning and committing one step costs a lane's first rank, by how many sequences live.

The scheduler is the real one and nothing else runs: results are made up outside of the measured time. Every
running sequence decodes and is given a page once in `PAGE_TOKENS` steps; their prompts differ in length, so
each step gives as many of them one. What the calls return is freed outside of the measured time: it is the
caller's, and goes when all have read it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from statistics import median

from k2dist.cache import PagePool
from k2dist.ids import Generation, LaneId, RequestId
from k2dist.messages import Message, Request, Sampling, StepPlan, StepResult
from k2dist.scheduler import Limits, Scheduler

CASES = ((64, 0), (1024, 0), (8192, 0), (32768, 0), (64, 32768), (1024, 32768))  # decoding, waiting
PAGE_TOKENS = 64
NUM_STEPS = 2 * PAGE_TOKENS  # every sequence crosses the end of a page twice
_NUM_TENANTS = 16


class SchedulerCost(Message, frozen=True, kw_only=True):
    """One step of a lane with `num_decoding` granted rows; times are medians over `num_steps` steps."""

    num_decoding: int
    num_waiting: int
    num_steps: int
    plan_ms: float
    commit_ms: float
    step_ms: float  # plan and commit of the same step
    step_ms_min: float  # of the fastest step
    step_ms_max: float  # of the slowest step
    row_us: float  # of one granted row in a median step


def measure(cases: Sequence[tuple[int, int]] = CASES, num_steps: int = NUM_STEPS) -> Iterator[SchedulerCost]:
    """The cost of each case, (decoding, waiting), as it becomes known."""
    for num_decoding, num_waiting in cases:
        yield _measure(num_decoding, num_waiting, num_steps)


def _measure(num_decoding: int, num_waiting: int, num_steps: int) -> SchedulerCost:
    scheduler = full_lane(num_decoding, num_waiting, num_steps)
    plans, commits = [], []
    for step in range(1, num_steps + 1):
        started_s = time.perf_counter()
        plan = scheduler.plan(Generation(0), step, started_s)
        planned_s = time.perf_counter()
        result = made_up(plan)
        before_s = time.perf_counter()
        events = scheduler.commit(result, before_s)
        commits.append((time.perf_counter() - before_s) * 1e3)
        plans.append((planned_s - started_s) * 1e3)
        assert len(plan.grants) == len(events) == num_decoding, "somebody does not decode"
        del plan, result, events  # else the next calls would pay for it
    steps = [plan_ms + commit_ms for plan_ms, commit_ms in zip(plans, commits, strict=True)]
    return SchedulerCost(
        num_decoding=num_decoding,
        num_waiting=num_waiting,
        num_steps=num_steps,
        plan_ms=median(plans),
        commit_ms=median(commits),
        step_ms=median(steps),
        step_ms_min=min(steps),
        step_ms_max=max(steps),
        row_us=median(steps) * 1e3 / num_decoding,
    )


def full_lane(num_decoding: int, num_waiting: int, num_steps: int) -> Scheduler:
    """A lane whose places are taken by sequences that decode on, while others of many tenants wait."""
    max_tokens = num_steps + 2
    pages_each = -(-(PAGE_TOKENS + max_tokens) // PAGE_TOKENS)
    scheduler = Scheduler(
        Limits(
            step_tokens=num_decoding * PAGE_TOKENS,  # all prompts in one step
            chunk_tokens=PAGE_TOKENS,
            max_running=num_decoding,
            max_waiting=num_decoding + num_waiting,
        ),
        PagePool(num_decoding * pages_each, PAGE_TOKENS),
        end_token_ids=frozenset({0}),
        token_bytes=lambda token_id: b"",
        max_positions=2**17,
    )
    for number in range(num_decoding):
        scheduler.add(_request(number, max_tokens), time.perf_counter())
    plan = scheduler.plan(Generation(0), 0, time.perf_counter())
    scheduler.commit(made_up(plan), time.perf_counter())
    assert len(plan.new) == num_decoding, "somebody does not run"
    for number in range(num_decoding, num_decoding + num_waiting):
        scheduler.add(_request(number, max_tokens), time.perf_counter())
    assert scheduler.load(LaneId(0)).num_waiting == num_waiting
    return scheduler


def _request(number: int, max_tokens: int) -> Request:
    """One of its kind: the prompts of no two begin alike, and their lengths are spread over a page."""
    return Request(
        request_id=RequestId(str(number)),
        prompt=tuple(range(number + 1, number + 2 + number % PAGE_TOKENS)),
        tenant=str(number % _NUM_TENANTS),
        sampling=Sampling(max_tokens=max_tokens, seed=number),
    )


def made_up(plan: StepPlan) -> StepResult:
    seq_ids = tuple(grant.seq_id for grant in plan.grants if grant.samples)
    return StepResult(
        generation=plan.generation,
        step=plan.step,
        seq_ids=seq_ids,
        token_ids=(1,) * len(seq_ids),
        logprobs=(None,) * len(seq_ids),
    )
