"""A cluster's plan as text."""

from __future__ import annotations

from collections.abc import Iterator

from k2dist.planner import ClusterPlan, Phase, StartEstimate, StepCost
from k2dist.planner.memory import gb


def plan_lines(plan: ClusterPlan) -> Iterator[str]:
    yield from _heading(plan)
    yield ""
    yield "memory"
    yield from _indented(str(plan.memory))
    yield from _cache(plan)
    yield ""
    yield from str(plan.losses).splitlines()
    yield ""
    yield from _start(plan.start)
    yield ""
    yield from _speed(plan)
    if plan.notes:
        yield ""
        yield from (f"note: {note}" for note in plan.notes)


def _heading(plan: ClusterPlan) -> Iterator[str]:
    alone = f" + {plan.expert_only_ranks} ranks for experts only" if plan.expert_only_ranks else ""
    nodes = "one node" if plan.num_nodes == 1 else f"{plan.num_nodes} nodes"
    yield (
        f"{plan.cluster}: {plan.model} on {nodes} of {plan.ranks_per_node} x {plan.device.name}, "
        f"{plan.lanes} lanes x tp {plan.tp}{alone} = {plan.world_size} ranks, {plan.kernels} kernels"
    )
    yield "legal: tp cuts no head and no scale block, every expert has a slot, ranks spread evenly over nodes"


def _cache(plan: ClusterPlan) -> Iterator[str]:
    cache = plan.cache
    most = "" if cache.max_tokens_per_lane is None else f" (at most {cache.max_tokens_per_lane:,})"
    yield (
        f"  cache as configured: {cache.num_pages:,} pages of {cache.page_tokens} tokens, "
        f"{cache.tokens_per_lane:,} tokens a lane{most}, {cache.tokens:,} in all; "
        f"{gb(cache.bytes_per_rank)} a rank"
    )


def _start(start: StartEstimate) -> Iterator[str]:
    yield (
        f"start, about {_seconds(start.ready_s)}: processes {start.start_s:.0f} s, load "
        f"{_seconds(start.load_s)}, self-test {start.test_s:.0f} s, join {start.join_s:.0f} s"
    )
    if start.warm_s:
        recording = f"{_seconds(start.recapture_s)} to record {start.num_graphs} graphs, in each generation"
        yield f"  of it {start.warm_s:.0f} s to compile kernels" + (f", {recording}" * bool(start.num_graphs))
    yield (
        f"  a node reads {gb(start.node_bytes)} at {start.disk_rate / 1e9:g} GB/s; all nodes together "
        f"{gb(start.total_bytes)}, the fullest rank {gb(start.rank_bytes)}"
    )
    told = ", ".join(f"{at.disk_rate / 1e9:g} GB/s {_seconds(at.load_s)}" for at in start.by_rate)
    yield f"  load by what a node reads: {told}"


def _speed(plan: ClusterPlan) -> Iterator[str]:
    found, wire = plan.estimate, plan.wire
    asked = found.workload
    yield (
        f"estimate for prompts of {asked.prompt_len:,} and outputs of {asked.output_len:,} tokens; shares of "
        f"peaks and waits are assumed (planner/assumptions.py), and nothing of it is measured here"
    )
    yield _phase("prompts only", found.prefill, "prompt tokens/s")
    yield _phase(f"decode only, {found.decode.lane_rows} a lane", found.decode, "tokens/s")
    yield (
        f"  one request alone: first token {1e3 * found.alone_ttft_s:,.0f} ms, then every "
        f"{1e3 * found.alone.cost.step_s:,.1f} ms ({found.alone.binding})"
    )
    serving = found.serving
    yield (
        f"  serving {serving.concurrency:,} at once ({serving.limit}): {serving.output_tokens_per_s:,.0f} "
        f"tokens/s out, {serving.prompt_tokens_per_s:,.0f} in, {serving.requests_per_s:,.1f} requests/s; "
        f"first token {1e3 * serving.ttft_s:,.0f} ms, then every {1e3 * serving.tpot_s:,.1f} ms; binds: "
        f"{serving.binding}"
    )
    yield (
        f"  a rank sends a step: decode {_mega(wire.decode_bytes)} ({_mega(wire.decode_far_bytes)} to other "
        f"nodes), prompts {_mega(wire.prefill_bytes)} ({_mega(wire.prefill_far_bytes)})"
    )
    yield "  a serving step by part, ms: compute + memory + network + wait"
    yield from _parts(serving.cost)


def _phase(name: str, phase: Phase, unit: str) -> str:
    return (
        f"  {name}: {phase.tokens_per_s:,.0f} {unit}, {phase.rank_tokens_per_s:,.0f} a rank; a step "
        f"{1e3 * phase.cost.step_s:,.1f} ms; binds: {phase.binding}"
    )


def _parts(cost: StepCost) -> Iterator[str]:
    for part in cost.parts:
        terms = (part.compute_s, part.memory_s, part.network_s, part.wait_s)
        told = " + ".join(f"{1e3 * term:.2f}" for term in terms)
        yield f"    {part.part:14} {1e3 * part.total_s:9.2f} = {told}"
    yield f"    {'the host beside':14} {1e3 * cost.host_s:8.2f}"


def _indented(text: str) -> Iterator[str]:
    return (f"  {line}" for line in text.splitlines())


def _seconds(seconds: float) -> str:
    return f"{seconds:,.0f} s" if seconds < 120 else f"{seconds / 60:,.1f} min"


def _mega(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"
