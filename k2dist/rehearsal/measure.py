"""A rank of a cluster's layout, rehearsed on this device: as many layers as fit, timed step by step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, median

import torch
from k2kernels import KernelSet
from k2kernels.bench.ceilings import Ceilings, measure_ceilings
from k2kernels.bench.timing import Clock

from k2dist.config import Architecture
from k2dist.config.cluster import ClusterConfig
from k2dist.engine.kernels import select_kernels
from k2dist.errors import CapacityError, UsageError
from k2dist.messages import Message
from k2dist.parallel import Layout
from k2dist.planner import Terms, configured_terms, form_named, plan_memory
from k2dist.planner.buffers import spare_pages
from k2dist.planner.fewer_layers import LayerFit, fewest_layers, first_layers, fit_of, most_layers
from k2dist.planner.memory import arithmetic, gb
from k2dist.planner.work import Part, Traffic
from k2dist.rehearsal.floor import Floor
from k2dist.rehearsal.load import Load
from k2dist.rehearsal.memory import held_bytes, peak_of, usable_bytes
from k2dist.rehearsal.parts import StepTimes
from k2dist.rehearsal.rank import RehearsedRank
from k2dist.rehearsal.report import Exchanged, MemoryLine, PartTime, RehearsalReport

WARM_STEPS = 2  # the first ones touch memory for the first time, and compile kernels where there are such

_CEILING_S = 0.5  # for each measurement of one
_MOE_PARTS = frozenset({Part.ROUTER, Part.DISPATCH, Part.EXPERTS, Part.COMBINE, Part.SHARED})
_UNBOUNDED = frozenset({Part.HOST, Part.EMBEDDING})

Note = Callable[[], None]


class Rehearsal(Message, frozen=True, kw_only=True):
    """What is to be rehearsed. `layers`: None: the most that fit."""

    cluster: ClusterConfig
    model: str  # for the report
    world_rank: int
    load: Load
    kernels: str
    device: str
    layers: int | None = None


@dataclass(frozen=True, slots=True)
class _Steps:
    times: list[StepTimes]  # of the timed ones
    traffic: list[Traffic]  # of the MoE layers of the last one
    world_bytes: tuple[int, int]  # sent and received in a step, of the group of all ranks
    lane_bytes: tuple[int, int]
    peak_bytes: int | None

    @property
    def median(self) -> StepTimes:
        """Of each part by itself: what disturbs one part of one step is in no figure."""
        parts = {part: median(times.parts[part] for times in self.times) for part in Part}
        return StepTimes(parts, median(times.aside_s for times in self.times))


def check_rehearsal(rehearsal: Rehearsal, architecture: Architecture, layout: Layout) -> None:
    """Raise `UsageError` for what cannot be rehearsed, whatever the device."""
    load, world_rank, layers = rehearsal.load, rehearsal.world_rank, rehearsal.layers
    step_tokens = rehearsal.cluster.scheduler.step_tokens
    if not 0 <= world_rank < layout.world_size:
        raise UsageError(f"--rank {world_rank}: the layout has ranks 0 to {layout.world_size - 1}")
    if load.decode < 0 or load.prompt_tokens < 0 or load.num_rows == 0:
        raise UsageError(
            f"--decode {load.decode} --prompt-tokens {load.prompt_tokens}: a step needs at least one row"
        )
    if load.num_rows > step_tokens:
        raise UsageError(
            f"--decode {load.decode} + --prompt-tokens {load.prompt_tokens} = {load.num_rows} rows: this "
            f"config's steps have at most scheduler.step_tokens={step_tokens}"
        )
    if load.num_steps <= WARM_STEPS:
        raise UsageError(f"--steps {load.num_steps - WARM_STEPS}: use at least 1")
    longest = max(load.context + load.num_steps, load.prompt_tokens)
    if load.context < 1 or longest > architecture.max_positions:
        raise UsageError(
            f"--context {load.context}: with {load.num_steps} steps after it, use 1 to "
            f"{architecture.max_positions - load.num_steps}"
        )
    if load.skew < 0.0:
        raise UsageError(f"--skew {load.skew:g}: use 0 (all experts alike) or more")
    fewest, most = fewest_layers(architecture), architecture.num_layers
    if layers is not None and not fewest <= layers <= most:
        raise UsageError(
            f"--layers {layers}: use {fewest} (the {architecture.first_dense_layers} dense and one with "
            f"experts) to {most}"
        )


def num_notes(rehearsal: Rehearsal, num_layers: int) -> int:
    """How often `run` says that it has come on."""
    return 2 + num_layers + rehearsal.load.num_steps


def fit(rehearsal: Rehearsal, architecture: Architecture, layout: Layout) -> LayerFit:
    """The layers to rehearse. `CapacityError`, with the sum, if they do not fit what is free."""
    device = torch.device(rehearsal.device)
    kernels = select_kernels(rehearsal.kernels, rehearsal.cluster.dtype, device)
    terms, rank = _terms(rehearsal, kernels), rehearsal.world_rank
    num_pages = rehearsal.load.num_pages(terms.page_tokens) + _spare_pages(rehearsal, architecture)
    usable = usable_bytes(device)
    if rehearsal.layers is None:
        found = most_layers(architecture, layout, terms, rank, num_pages, usable)
        if found is not None:
            return found
    num_layers = rehearsal.layers or fewest_layers(architecture)
    wanted = fit_of(architecture, layout, terms, rank, num_layers, num_pages)
    if wanted.needed_bytes > usable:
        raise CapacityError(
            f"rank {rank} with {num_layers} layers, the fewest asked for, takes {gb(wanted.needed_bytes)}: "
            f"{arithmetic(wanted.memory)}, cache {gb(wanted.num_pages * wanted.memory.page_bytes)}, a layer "
            f"being laid out {gb(wanted.laying_out)}; {gb(usable)} are usable here. Use fewer --layers or "
            f"sequences, or a device with more memory"
        )
    return wanted


def run(
    rehearsal: Rehearsal,
    architecture: Architecture,
    layout: Layout,
    fitted: LayerFit,
    *,
    note: Note = lambda: None,
) -> RehearsalReport:
    """Make up the rank, take its steps; the ceilings are measured before and after."""
    device = torch.device(rehearsal.device)
    kernels = select_kernels(rehearsal.kernels, rehearsal.cluster.dtype, device)
    few, few_layout = first_layers(architecture, layout, fitted.num_layers)
    with torch.inference_mode():
        clock = Clock(device, _CEILING_S)
        before = measure_ceilings(clock)
        note()
        rank = RehearsedRank(
            few,
            few_layout,
            rehearsal.world_rank,
            kernels,
            rehearsal.load,
            page_tokens=rehearsal.cluster.cache.page_tokens,
            device=device,
            num_spare_pages=_spare_pages(rehearsal, architecture),
            note=note,
        )
        steps = _take_steps(rank, rehearsal.load, device, note)
        ceilings = before.best(measure_ceilings(clock))
        note()
    floor = Floor(few, layout.tp, kernels.return_dtype.itemsize, ceilings).parts_s(rank.work, steps.traffic)
    parts = tuple(_part_time(part, steps.median, floor[part], few, architecture) for part in Part)
    return _report(rehearsal, architecture, layout, fitted, kernels, rank, steps, parts, ceilings)


def _take_steps(rank: RehearsedRank, load: Load, device: torch.device, note: Note) -> _Steps:
    for _ in range(WARM_STEPS):
        rank.step()
        note()
    before = _sent_and_received(rank)
    times = []
    with peak_of(device) as peak:
        for _ in range(load.num_steps - WARM_STEPS):
            rank.exchange.take_traffic()
            times.append(rank.step())
            note()
    moved = [now - then for now, then in zip(_sent_and_received(rank), before, strict=True)]
    world_sent, world_received, lane_sent, lane_received = (count // len(times) for count in moved)
    return _Steps(
        times=times,
        traffic=rank.exchange.take_traffic(),
        world_bytes=(world_sent, world_received),
        lane_bytes=(lane_sent, lane_received),
        peak_bytes=peak.num_bytes,
    )


def _sent_and_received(rank: RehearsedRank) -> tuple[int, int, int, int]:
    """Bytes since the start: to and from the world, to and from the lane."""
    world, lane = rank.world, rank.lane
    if lane is None:
        return world.num_bytes_sent, world.num_bytes_received, 0, 0
    return world.num_bytes_sent, world.num_bytes_received, lane.num_bytes_sent, lane.num_bytes_received


def _part_time(
    part: Part, times: StepTimes, floor_s: float, few: Architecture, whole: Architecture
) -> PartTime:
    layers, of_layers = _layers_of(part, few), _layers_of(part, whole)
    ratio = of_layers / layers if layers else 0.0
    measured_s = times.parts[part]
    return PartTime(
        part=part,
        layers=layers,
        of_layers=of_layers,
        measured_ms=1e3 * measured_s,
        ms=1e3 * measured_s * ratio,
        floor_ms=None if part in _UNBOUNDED else 1e3 * floor_s * ratio,
    )


def _layers_of(part: Part, architecture: Architecture) -> int:
    """In how many layers a part runs; once a step counts as one."""
    if part is Part.ATTENTION:
        return architecture.num_layers
    if part is Part.DENSE:
        return architecture.first_dense_layers
    return architecture.num_moe_layers if part in _MOE_PARTS else 1


def _report(
    rehearsal: Rehearsal,
    architecture: Architecture,
    layout: Layout,
    fitted: LayerFit,
    kernels: KernelSet,
    rank: RehearsedRank,
    steps: _Steps,
    parts: tuple[PartTime, ...],
    ceilings: Ceilings,
) -> RehearsalReport:
    cluster, load, place = rehearsal.cluster, rehearsal.load, layout.place(rehearsal.world_rank)
    terms = configured_terms(cluster, architecture)
    whole = plan_memory(architecture, layout, terms).ranks[rehearsal.world_rank]
    step_s = sum(part.ms for part in parts) / 1e3
    measured_ms = [1e3 * times.step_s for times in steps.times]
    return RehearsalReport(
        cluster=cluster.name,
        model=rehearsal.model,
        world_rank=rehearsal.world_rank,
        lane=place.lane,
        tp_rank=place.tp_rank,
        world_size=layout.world_size,
        num_lanes=layout.num_lanes,
        tp=layout.tp,
        device=_device_name(torch.device(rehearsal.device)),
        clock=rank.stopwatch.clock.name,
        kernels=kernels.fingerprint(),
        num_threads=torch.get_num_threads(),
        num_layers=fitted.num_layers,
        of_layers=architecture.num_layers,
        load=load,
        num_timed=len(steps.times),
        step_ms=1e3 * step_s,
        measured_ms=1e3 * steps.median.step_s,
        measured_ms_min=min(measured_ms),
        measured_ms_max=max(measured_ms),
        aside_ms=1e3 * steps.median.aside_s,
        parts=parts,
        exchanged=_exchanged(steps, place.experts, fitted.num_layers, architecture),
        ceilings=ceilings,
        memory=_memory(fitted, rank, steps),
        whole_rank_bytes=whole.fixed_bytes + cluster.cache.num_pages * whole.page_bytes,
        device_bytes=cluster.nodes.device_bytes,
        decode_tokens_per_s=layout.num_lanes * load.decode / step_s,
        prompt_tokens_per_s=layout.num_lanes * load.prompt_tokens / step_s,
    )


def _exchanged(
    steps: _Steps, slots: Sequence[Sequence[int]], num_layers: int, architecture: Architecture
) -> Exchanged | None:
    if not steps.traffic:
        return None
    layers = architecture.num_layers / num_layers
    moe_layers = architecture.num_moe_layers / len(steps.traffic)
    sent, received = (
        round(world * moe_layers + lane * layers)
        for world, lane in zip(steps.world_bytes, steps.lane_bytes, strict=True)
    )
    return Exchanged(
        rows_arrived=fmean(layer.rows_arrived for layer in steps.traffic),
        pairs=fmean(layer.pairs for layer in steps.traffic),
        slots=max(map(len, slots)),
        slots_hit=fmean(layer.slots_hit for layer in steps.traffic),
        bytes_sent=sent,
        bytes_received=received,
    )


def _memory(fitted: LayerFit, rank: RehearsedRank, steps: _Steps) -> tuple[MemoryLine, ...]:
    plan, cache = fitted.memory, rank.cache
    rows = [("weights", plan.weight_bytes, held_bytes(rank.weights))]
    if cache is not None:
        rows.append(("cache", fitted.num_pages * plan.page_bytes, cache.num_bytes))
        rows.append(("angles", plan.angles, held_bytes(cache.rope)))
    lines = [MemoryLine(name=name, planned=planned, held=held) for name, planned, held in rows]
    step_bytes = plan.activations + plan.exchange
    return (*lines, MemoryLine(name="a step's tensors", planned=step_bytes, held=steps.peak_bytes))


def _terms(rehearsal: Rehearsal, kernels: KernelSet) -> Terms:
    """For the rows of this load; nothing in reserve, since what is free is known."""
    return Terms(
        form=form_named(kernels.name, kernels.dtype.itemsize),
        page_tokens=rehearsal.cluster.cache.page_tokens,
        step_tokens=rehearsal.load.num_rows,
        max_samples=rehearsal.load.num_samples,
        reserve_bytes=0,
        device_bytes=None,
    )


def _spare_pages(rehearsal: Rehearsal, architecture: Architecture) -> int:
    """Of the cluster's ranks, if they record steps: a rehearsal records none, but holds what they would."""
    return spare_pages(configured_terms(rehearsal.cluster, architecture))


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
