"""What a site gives its users: tokens a second and times between them, for one kind of request.

    prefill   every lane computes prompts only, in chunks, `step_tokens` rows a step
    decode    every lane decodes, all requests at the middle of their outputs
    serving   both at once, as they come: for each output token of a request, its share of the prompt

Everything is a steady state of equal requests; `simulate` has arrivals, queues and pages in it.
"""

from __future__ import annotations

import math

from k2dist.config.cluster import ClusterConfig
from k2dist.errors import UsageError
from k2dist.messages import Message
from k2dist.planner.cost import StepCost, StepModel
from k2dist.planner.work import LaneWork


class Workload(Message, frozen=True, kw_only=True):
    """Equal requests. `concurrency`: under way in all lanes together; None: as many as run at once.

    `target_tpot_s`: a token may take so long; then `concurrency` is at most what keeps to it.
    """

    prompt_len: int = 2000
    output_len: int = 500
    concurrency: int | None = None
    target_tpot_s: float | None = None


class Bounds(Message, frozen=True, kw_only=True):
    """What a lane can take: of its config, and of the pages that it has."""

    step_tokens: int
    chunk_tokens: int
    max_running: int
    cache_tokens: int  # of one lane


class Phase(Message, frozen=True, kw_only=True):
    """A steady state. `tokens_per_s`: of all lanes together, prompt tokens or generated ones."""

    tokens_per_s: float
    rank_tokens_per_s: float
    lane_rows: int
    cost: StepCost
    binding: str


class Serving(Message, frozen=True, kw_only=True):
    """`ttft_s`: of a request that finds a place at once. `limit`: what keeps concurrency from being more."""

    concurrency: int
    limit: str
    output_tokens_per_s: float
    prompt_tokens_per_s: float
    requests_per_s: float
    tpot_s: float
    ttft_s: float
    binding: str
    cost: StepCost


class Estimate(Message, frozen=True, kw_only=True):
    """`first`: of the first request in an idle cluster; its decoding is `alone`."""

    workload: Workload
    prefill: Phase
    decode: Phase
    alone: Phase
    alone_ttft_s: float
    serving: Serving


def configured_bounds(config: ClusterConfig, num_pages: int) -> Bounds:
    scheduler = config.scheduler
    return Bounds(
        step_tokens=scheduler.step_tokens,
        chunk_tokens=scheduler.chunk_tokens,
        max_running=scheduler.max_running,
        cache_tokens=num_pages * config.cache.page_tokens,
    )


def estimate(model: StepModel, bounds: Bounds, workload: Workload) -> Estimate:
    """Raises `UsageError` for a request that no lane could hold."""
    lanes = model.site.lanes
    most, limit = _most_running(bounds, workload)
    wanted = most * lanes if workload.concurrency is None else workload.concurrency
    running = min(most, -(-wanted // lanes))
    if workload.concurrency is not None and wanted < most * lanes:
        limit = "--concurrency"
    if workload.target_tpot_s is not None:
        within = _most_within(model, bounds, workload, running)
        if within < running:
            running, limit = within, "--target-tpot"
    concurrency = min(running * lanes, wanted)
    return Estimate(
        workload=workload,
        prefill=_prefill(model, bounds, workload),
        decode=_decode(model, workload, most, lanes=lanes),
        alone=_decode(model, workload, 1, lanes=1),
        alone_ttft_s=_first_s(model, bounds, workload, others=None),
        serving=_serving(model, bounds, workload, running, concurrency, limit),
    )


def _most_running(bounds: Bounds, workload: Workload) -> tuple[int, str]:
    """Requests that a lane can have under way, and what ends it there."""
    length = workload.prompt_len + workload.output_len
    by_cache = bounds.cache_tokens // length
    if by_cache == 0:
        raise UsageError(
            f"--prompt-len {workload.prompt_len} --output-len {workload.output_len}: {length:,} tokens, and "
            f"a lane's cache holds {bounds.cache_tokens:,}; ask for less, or raise cache.num_pages"
        )
    if by_cache < bounds.max_running:
        return by_cache, "cache.num_pages"
    return bounds.max_running, "scheduler.max_running"


def _prefill(model: StepModel, bounds: Bounds, workload: Workload) -> Phase:
    """Prompts only: as many chunks as a step has room for, each at the middle of its prompt."""
    chunk = min(bounds.chunk_tokens, workload.prompt_len)
    prompts = max(bounds.step_tokens // chunk, 1)
    work = _lane_work(model, 0, workload, prompts * chunk, prompts)
    return _phase(model, work, work.prompt_rows, lanes=model.site.lanes)


def _decode(model: StepModel, workload: Workload, running: int, *, lanes: int) -> Phase:
    """`running` in each of so many lanes; nobody in the others."""
    return _phase(model, _lane_work(model, running, workload, 0, 0), running, lanes=lanes)


def _phase(model: StepModel, work: LaneWork, tokens: int, *, lanes: int) -> Phase:
    cost = model.step(work, lanes * work.num_rows)
    per_s = lanes * tokens / cost.step_s
    return Phase(
        tokens_per_s=per_s,
        rank_tokens_per_s=per_s / model.site.world_size,
        lane_rows=work.num_rows,
        cost=cost,
        binding=cost.binding,
    )


def _serving(
    model: StepModel, bounds: Bounds, workload: Workload, running: int, concurrency: int, limit: str
) -> Serving:
    """`running` under way in each lane: some of them catch up on their prompts while the rest decodes."""
    decoding, work = _mixed(model, bounds, workload, running)
    cost = model.even(work)
    ratio = concurrency / (running * model.site.lanes)
    per_s = model.site.lanes * decoding / cost.step_s * ratio
    return Serving(
        concurrency=concurrency,
        limit=limit,
        output_tokens_per_s=per_s,
        prompt_tokens_per_s=per_s * workload.prompt_len / workload.output_len,
        requests_per_s=per_s / workload.output_len,
        tpot_s=cost.step_s,
        ttft_s=_first_s(model, bounds, workload, others=cost),
        binding=cost.binding,
        cost=cost,
    )


def _mixed(model: StepModel, bounds: Bounds, workload: Workload, running: int) -> tuple[float, LaneWork]:
    """Rows that decode on average, and a step's work.

    A request stays `output_len` steps decoding and as many before that as its prompt has chunks; a step has
    room for `step_tokens` rows, so where prompts want more of it than there is, fewer decode.
    """
    chunks = math.ceil(workload.prompt_len / bounds.chunk_tokens)
    decoding = running * workload.output_len / (workload.output_len + chunks)
    per_row = 1.0 + workload.prompt_len / workload.output_len
    decoding = min(decoding, bounds.step_tokens / per_row)
    prompt_rows = decoding * workload.prompt_len / workload.output_len
    prompts = prompt_rows / min(bounds.chunk_tokens, workload.prompt_len)
    work = _lane_work(
        model, max(round(decoding), 1), workload, round(prompt_rows), max(math.ceil(prompts), 1)
    )
    return decoding, work


def _most_within(model: StepModel, bounds: Bounds, workload: Workload, most: int) -> int:
    """The most requests a lane may have under way for the target; raises `UsageError` if one is too many."""
    assert workload.target_tpot_s is not None

    def tpot_s(running: int) -> float:
        return model.even(_mixed(model, bounds, workload, running)[1]).step_s

    if tpot_s(1) > workload.target_tpot_s:
        raise UsageError(
            f"--target-tpot {1e3 * workload.target_tpot_s:g}: with one request in each lane a token takes "
            f"{1e3 * tpot_s(1):.1f} ms here; allow more, or take another layout"
        )
    least = 1
    while least < most:
        middle = (least + most + 1) // 2
        if tpot_s(middle) <= workload.target_tpot_s:
            least = middle
        else:
            most = middle - 1
    return least


def _first_s(model: StepModel, bounds: Bounds, workload: Workload, others: StepCost | None) -> float:
    """From its arrival to its first token: the steps that its chunks take, beside others or alone."""
    chunks = math.ceil(workload.prompt_len / bounds.chunk_tokens)
    if others is not None:
        return (chunks + 0.5) * others.step_s  # it comes in the middle of a step
    chunk = min(bounds.chunk_tokens, workload.prompt_len)
    work = _lane_work(model, 0, workload, chunk, 1)
    return chunks * model.step(work, chunk).step_s


def _lane_work(
    model: StepModel, decoding: int, workload: Workload, prompt_rows: int, prompts: int
) -> LaneWork:
    """Outputs are half done, and so are prompts."""
    rows = decoding + prompt_rows
    return LaneWork(
        num_rows=rows,
        own_rows=model.site.own_rows(rows),
        decode_rows=decoding,
        num_keys=workload.prompt_len + workload.output_len / 2,
        prompt_rows=prompt_rows,
        prompts=max(prompts, 1),
        prompt_start=max(workload.prompt_len - prompt_rows / max(prompts, 1), 0) / 2,
    )
