"""A cluster as it is planned, in one object: what `k2dist plan`, its `--json` and the RPC `Plan` give.

Names of fields are stable: what reads the JSON (deploy, doctor) relies on them. Additions only.
"""

from __future__ import annotations

from msgspec.structs import replace

from k2dist.config.architecture import Architecture
from k2dist.config.cluster import ClusterConfig
from k2dist.errors import LayoutError
from k2dist.messages import Message
from k2dist.parallel import Layout, configured_layout
from k2dist.planner.assumptions import ASSUMED, Assumptions
from k2dist.planner.cost import StepModel
from k2dist.planner.devices import Device
from k2dist.planner.estimate import Estimate, Workload, configured_bounds, estimate
from k2dist.planner.losses import Losses, survivable_losses
from k2dist.planner.memory import MemoryPlan, check_memory, plan_memory
from k2dist.planner.nearest import nearest_fits
from k2dist.planner.site import configured_site
from k2dist.planner.start import StartEstimate, estimate_start
from k2dist.planner.terms import configured_kernels, configured_terms


class CachePlan(Message, frozen=True, kw_only=True):
    """Of the latent cache, as configured. `max_tokens_per_lane`: what would fit; None: not known."""

    num_pages: int  # of each lane
    page_tokens: int
    tokens_per_lane: int
    tokens: int
    bytes_per_rank: int
    max_tokens_per_lane: int | None


class Wire(Message, frozen=True, kw_only=True):
    """Bytes that one rank sends to others in a step, in all layers; `far`: of these, to other nodes."""

    decode_bytes: int
    decode_far_bytes: int
    prefill_bytes: int
    prefill_far_bytes: int


class ClusterPlan(Message, frozen=True, kw_only=True):
    """See the module. `load_s` and `ready_s` are `start`'s, here because much else is sized by them."""

    cluster: str
    model: str
    device: Device
    kernels: str
    num_nodes: int
    ranks_per_node: int
    world_size: int
    lanes: int
    tp: int
    expert_only_ranks: int
    memory: MemoryPlan
    cache: CachePlan
    losses: Losses
    start: StartEstimate
    load_s: float
    ready_s: float
    wire: Wire
    estimate: Estimate
    assumptions: Assumptions
    notes: tuple[str, ...]


def plan_cluster(
    config: ClusterConfig,
    model: str,
    architecture: Architecture,
    workload: Workload,
    *,
    layout: Layout | None = None,
    assumed: Assumptions = ASSUMED,
) -> ClusterPlan:
    """The plan of `config` for the model called `model`; `layout`: another table than the config's first one.

    Raises `LayoutError` for what cannot work, with the arithmetic and the nearest that can, `ConfigError` for
    a device that is not known, `UsageError` for a workload that fits no lane.
    """
    try:
        return _planned(config, model, architecture, workload, layout, assumed)
    except LayoutError as error:
        raise LayoutError("\n".join((str(error), *nearest_fits(config, architecture)))) from error


def _planned(
    config: ClusterConfig,
    model: str,
    architecture: Architecture,
    workload: Workload,
    layout: Layout | None,
    assumed: Assumptions,
) -> ClusterPlan:
    layout = layout or configured_layout(architecture, config.parallel)
    terms = configured_terms(config, architecture)
    site = configured_site(config, architecture, layout, assumed)
    memory = plan_memory(architecture, layout, terms)
    check_memory(memory, config.cache.num_pages)
    steps = StepModel(site)
    found = estimate(steps, configured_bounds(config, config.cache.num_pages), workload)
    start = estimate_start(memory.ranks, site, len(terms.recorded))
    return ClusterPlan(
        cluster=config.name,
        model=model,
        device=site.device,
        kernels=configured_kernels(config),
        num_nodes=site.num_nodes,
        ranks_per_node=site.ranks_per_node,
        world_size=layout.world_size,
        lanes=layout.num_lanes,
        tp=layout.tp,
        expert_only_ranks=layout.world_size - layout.num_lanes * layout.tp,
        memory=memory,
        cache=_cache(config, memory, layout.num_lanes),
        losses=survivable_losses(
            architecture,
            layout,
            terms,
            num_nodes=config.nodes.num_nodes,
            least_tokens=least_tokens(architecture, config),
        ),
        start=start,
        load_s=start.load_s,
        ready_s=start.ready_s,
        wire=_wire(found, site.far_share),
        estimate=found,
        assumptions=assumed,
        notes=tuple(_notes(config, site.device, site.num_nodes, len(terms.recorded))),
    )


def least_tokens(architecture: Architecture, config: ClusterConfig) -> int:
    """One sequence as long as the cluster takes any."""
    return min(architecture.max_positions, config.cache.num_pages * config.cache.page_tokens)


def fitting_workload(config: ClusterConfig, architecture: Architecture, workload: Workload) -> Workload:
    """The same, shortened to half of what one lane can hold: for where nobody has asked for any length."""
    most = least_tokens(architecture, config) // 2
    if workload.prompt_len + workload.output_len <= most:
        return workload
    output_len = max(most // 5, 1)
    return replace(workload, prompt_len=max(most - output_len, 1), output_len=output_len)


def _cache(config: ClusterConfig, memory: MemoryPlan, lanes: int) -> CachePlan:
    tokens = config.cache.num_pages * config.cache.page_tokens
    return CachePlan(
        num_pages=config.cache.num_pages,
        page_tokens=config.cache.page_tokens,
        tokens_per_lane=tokens,
        tokens=tokens * lanes,
        bytes_per_rank=config.cache.num_pages * memory.fullest.page_bytes,
        max_tokens_per_lane=memory.num_tokens,
    )


def _wire(found: Estimate, far_share: float) -> Wire:
    decode, prefill = found.decode.cost.bytes_sent, found.prefill.cost.bytes_sent
    return Wire(
        decode_bytes=decode,
        decode_far_bytes=round(decode * far_share),
        prefill_bytes=prefill,
        prefill_far_bytes=round(prefill * far_share),
    )


def _notes(config: ClusterConfig, device: Device, num_nodes: int, num_graphs: int) -> list[str]:
    """What whoever rents this should know before."""
    notes = []
    if num_nodes == 1:
        notes.append("one node: losing it loses accepted requests too, since nothing else holds a copy")
    if not device.has_run:
        notes.append(f"{device.name}: k2dist has computed on none yet; this is planned only")
    if config.ranks.rank_gpus > 0:
        notes.append(_how_it_decodes(config, num_graphs))
    return notes


def _how_it_decodes(config: ClusterConfig, num_graphs: int) -> str:
    """On GPUs."""
    factor, is_alone = config.capacity_factor, config.parallel.world_size == 1
    room = "" if is_alone else f", in frames with room for {factor or 0:g} times an even router's load"
    repeated = "" if is_alone else "; a step that overflows one is repeated exactly, with the same bits"
    if num_graphs:
        most = config.scheduler.max_running
        return f"decode steps of up to {most} rows are replayed from {num_graphs} graphs{room}{repeated}"
    if config.ranks.graphs == "off":
        return "ranks.graphs=off: decode steps are launched kernel by kernel, not as graphs"
    return (
        "exchange.capacity_factor: none, so decode steps are launched kernel by kernel, not as graphs, and "
        "every MoE layer waits to hear how much comes; with 1.25 they are recorded, in frames that many "
        "ranks fill badly"
    )
