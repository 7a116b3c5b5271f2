"""`k2dist plan CONFIG --simulate TRACE`, or `--rate`, or `--requests` with `--concurrency`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import typer
from msgspec.structs import replace

from k2dist.cli.bar import bar
from k2dist.cli.shown import print_json
from k2dist.config import Architecture
from k2dist.config.cluster import ClusterConfig
from k2dist.errors import UsageError
from k2dist.messages import Message
from k2dist.parallel import configured_layout
from k2dist.planner import ClusterPlan, StepModel, Workload
from k2dist.planner.arrivals import Arrival, Mix, made_up, read_trace
from k2dist.planner.loss import Loss, loss_of, read_loss
from k2dist.planner.plots import page, sheet
from k2dist.planner.report import Percentiles, SimulationReport
from k2dist.planner.simulate import Simulation, simulate
from k2dist.planner.site import configured_site
from k2dist.planner.skew import imbalance_of

NUM_REQUESTS = 2000


class Asked(Message, frozen=True, kw_only=True):
    """What the command line says of a simulation; see the options of `k2dist plan`."""

    trace: Path | None
    rate: float | None
    requests: int | None
    shared: float
    sigma: float
    skew: float | None
    lose: str | None
    plot: Path | None


def run_simulation(
    config: ClusterConfig,
    architecture: Architecture,
    plan: ClusterPlan,
    workload: Workload,
    asked: Asked,
    *,
    as_json: bool,
) -> None:
    """Simulate, print the report, and draw its curves where that is asked for."""
    layout = configured_layout(architecture, config.parallel)
    assumed = plan.assumptions
    if asked.skew is not None:
        imbalance = imbalance_of(layout, architecture.num_experts, architecture.top_k, asked.skew)
        assumed = replace(assumed, imbalance=imbalance)
    site = configured_site(config, architecture, layout, assumed)
    loss: Loss | None = None
    if asked.lose is not None:
        world_rank, at_s = read_loss(asked.lose, layout.world_size)
        rank = plan.memory.ranks[world_rank]
        loss = loss_of(architecture, layout, rank, site, at_s, plan.start.recapture_s)
    arrivals = _arrivals(asked, workload)
    is_closed = asked.trace is None and asked.rate is None
    most_open = (workload.concurrency or plan.estimate.serving.concurrency) if is_closed else None
    simulation = Simulation(config, StepModel(site), arrivals, max_open=most_open, loss=loss)
    with bar("requests simulated", is_quiet=as_json) as show:
        for one in simulate(simulation):
            show(one.num_finished + one.num_refused, len(arrivals))
    report = simulation.report()
    if asked.plot is not None:
        title = _title(plan)
        is_svg = asked.plot.suffix == ".svg"
        drawn = sheet(title, report) if is_svg else page(title, list(_rows(report)), report)
        asked.plot.write_text(drawn, encoding="utf-8")
    if as_json:
        print_json(report)
        return
    typer.echo("\n".join([_title(plan), *(f"  {name:32} {value}" for name, value in _rows(report))]))
    if asked.plot is not None:
        typer.echo(f"curves in {asked.plot}")


def _arrivals(asked: Asked, workload: Workload) -> tuple[Arrival, ...]:
    if asked.trace is not None:
        if asked.rate is not None or asked.requests is not None:
            raise UsageError("--simulate has the requests in it; leave out --rate and --requests")
        try:
            text = asked.trace.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--simulate {asked.trace}: cannot be read ({error})") from error
        return read_trace(text, str(asked.trace))
    mix = Mix(workload=workload, sigma=asked.sigma, shared=asked.shared)
    return tuple(made_up(mix, asked.requests or NUM_REQUESTS, asked.rate))


def _title(plan: ClusterPlan) -> str:
    where = f"{plan.world_size} x {plan.device.name}"
    return f"{plan.cluster}: {plan.lanes} lanes x tp {plan.tp} on {where}, simulated"


def _rows(report: SimulationReport) -> Iterator[tuple[str, str]]:
    r = report
    yield "requests", f"{r.num_requests:,}: {r.num_finished:,} finished, {r.num_refused:,} refused"
    yield "virtual time", f"{r.duration_s:,.1f} s in {r.num_steps:,} steps, {r.idle_s:,.1f} s idle"
    yield "tokens/s out", f"{r.output_tokens_per_s:,.0f}"
    yield "prompt tokens/s computed", f"{r.prompt_tokens_per_s:,.0f}"
    yield "first token, s", _percentiles(r.ttft_s, 1.0)
    yield "each next token, ms", _percentiles(r.tpot_s, 1e3)
    yield "whole answer, s", _percentiles(r.whole_s, 1.0)
    yield "a step, ms", _percentiles(r.step_s, 1e3)
    yield "most at once", f"{r.most_running:,} running, {r.most_waiting:,} waiting"
    yield "preempted", f"{r.num_preempted:,}"
    yield "prompt tokens found in the cache", f"{100 * r.cached_share:.1f}%"
    yield "busiest rank's experts", f"{r.imbalance:.2f} times the mean"
    bound = ", ".join(f"{name} {100 * share:.0f}%" for name, share in list(r.binding.items())[:4])
    yield "stepping time bound by", bound
    if r.loss is not None:
        yield from _loss_rows(r)


def _loss_rows(report: SimulationReport) -> Iterator[tuple[str, str]]:
    loss = report.loss
    assert loss is not None
    whose = "no lane" if loss.lane is None else f"lane {loss.lane}"
    lost = f"rank {loss.world_rank} ({whose}) lost"
    yield lost, f"at {loss.at_s:,.1f} s; nobody steps for {loss.pause_s:,.1f} s"
    yield "its lane takes requests again", f"at {loss.lane_back_s:,.1f} s"
    yield (
        "its requests, on other lanes",
        f"{loss.num_readmitted:,}, with {loss.num_tokens_recomputed:,} tokens to compute again",
    )


def _percentiles(values: Percentiles, scale: float) -> str:
    named = (("p50", values.p50), ("p90", values.p90), ("p95", values.p95), ("p99", values.p99))
    told = ", ".join(f"{name} {scale * value:,.2f}" for name, value in named)
    return f"{told}, most {scale * values.most:,.2f}"
