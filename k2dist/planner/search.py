"""Every legal layout of some machines, ranked by what it gives for one kind of request.

    nodes      1 to as many as there are
    tp         each that cuts no head and no scale block and divides the ranks; the rest is lanes
    copies     each expert once, or twice where a node's loss is then survived in memory
    exchange   exact splits, or frames of a fixed capacity: whichever decodes faster

Steps, chunks and running sequences are those of `BASE`; a lane gets the pages that fit, less a fiftieth.
"""

from __future__ import annotations

from collections.abc import Iterator

from msgspec.structs import replace

from k2dist.config.architecture import Architecture
from k2dist.config.cluster import (
    GPU_CAPACITY_FACTOR,
    CacheConfig,
    ClusterConfig,
    DeadlinesConfig,
    ExchangeConfig,
    NetworkConfig,
    NodesConfig,
    ParallelConfig,
    RanksConfig,
    SchedulerConfig,
)
from k2dist.errors import LayoutError, UsageError
from k2dist.messages import Message
from k2dist.parallel import configured_layout, legal_tp
from k2dist.planner.assumptions import ASSUMED, Assumptions
from k2dist.planner.cost import StepModel
from k2dist.planner.devices import Device, device_bytes
from k2dist.planner.estimate import Serving, Workload, configured_bounds, estimate
from k2dist.planner.losses import survivable_losses
from k2dist.planner.rank_memory import RankCosts, pages_that_fit
from k2dist.planner.site import configured_site
from k2dist.planner.terms import configured_terms

PAGE_TOKENS = 64
_SPARE = 0.98  # of the pages that fit; what a plan counts too low takes the rest

BASE = ClusterConfig(
    name="base",
    parallel=ParallelConfig(lanes=1, tp=1),
    scheduler=SchedulerConfig(step_tokens=4096, chunk_tokens=2048, max_running=256),
    ranks=RanksConfig(rank_cpus=8, rank_gpus=1, threads=8),
    network=NetworkConfig(address="node"),
    deadlines=DeadlinesConfig(start_s=600, load_s=3600),
)


class Hardware(Message, frozen=True, kw_only=True):
    device: Device
    nodes: int
    gpus: int  # of each node


class Found(Message, frozen=True, kw_only=True):
    """`copies`: of each expert. `nodes_in_memory`: that may be lost with every weight still in a memory."""

    config: ClusterConfig
    copies: int
    tokens_per_lane: int
    nodes_in_memory: int
    serving: Serving


def search(
    architecture: Architecture, hardware: Hardware, workload: Workload, assumed: Assumptions = ASSUMED
) -> tuple[Found, ...]:
    """The best first: most output tokens a second; of equals fewer nodes, then the lower token time.

    Raises `LayoutError` if nothing fits these machines, `UsageError` if nothing that fits does what is asked.
    """
    configs = list(_configs(architecture, hardware))
    if not configs:
        raise LayoutError(
            f"{hardware.nodes} x {hardware.gpus} {hardware.device.name}: no legal layout holds the weights "
            f"and any cache on up to so many nodes; add nodes, or take devices with more memory"
        )
    found, refused = [], ""
    for config in configs:
        try:
            one = _found(architecture, config, workload, assumed)
            if one.copies == 1 or one.nodes_in_memory > 0:  # else attention's slices lie once: of no use
                found.append(one)
        except UsageError as error:
            refused = str(error)
    if not found:
        raise UsageError(f"none of {len(configs)} layouts that fit does what is asked; the last: {refused}")
    return tuple(
        sorted(
            found,
            key=lambda one: (
                -one.serving.output_tokens_per_s,
                one.config.nodes.num_nodes or 0,
                one.serving.tpot_s,
            ),
        )
    )


def _configs(architecture: Architecture, hardware: Hardware) -> Iterator[ClusterConfig]:
    """All that fit with any page."""
    for nodes in range(1, hardware.nodes + 1):
        for tp in legal_tp(architecture):
            for copies in (1, 2):
                config = _config(architecture, hardware, nodes, tp, copies)
                if config is not None:
                    yield config


def _config(
    architecture: Architecture, hardware: Hardware, nodes: int, tp: int, copies: int
) -> ClusterConfig | None:
    """None: not legal, of no use, or it does not fit."""
    world_size = nodes * hardware.gpus
    slots, rest = divmod(copies * architecture.num_experts, world_size)
    if world_size % tp or world_size > architecture.num_experts or (copies > 1 and (rest or nodes == 1)):
        return None
    config = replace(
        BASE,
        name=f"{hardware.device.name}-{nodes}x{hardware.gpus}",
        parallel=ParallelConfig(lanes=world_size // tp, tp=tp, slots_per_rank=slots if copies > 1 else None),
        nodes=NodesConfig(num_nodes=nodes, device=hardware.device.name),
    )
    num_pages = int(_SPARE * _most_pages(architecture, config))
    if num_pages < 1:
        return None
    return replace(config, cache=CacheConfig(page_tokens=PAGE_TOKENS, num_pages=num_pages))


def _most_pages(architecture: Architecture, config: ClusterConfig) -> int:
    """With graphs, whichever exchange is taken."""
    terms = replace(configured_terms(_padded(config), architecture), page_tokens=PAGE_TOKENS)
    memory = device_bytes(config)
    assert memory is not None, "searched devices have a known memory"
    parallel = config.parallel
    costs = RankCosts(architecture, parallel.tp, terms)
    slots = parallel.slots_per_rank or -(-architecture.num_experts // parallel.world_size)
    rank = costs.evenly(parallel.world_size, parallel.lanes, slots=slots)
    return pages_that_fit(rank, memory) or 0


def _padded(config: ClusterConfig) -> ClusterConfig:
    return replace(config, exchange=ExchangeConfig(capacity_factor=GPU_CAPACITY_FACTOR))


def _found(
    architecture: Architecture, config: ClusterConfig, workload: Workload, assumed: Assumptions
) -> Found:
    layout = configured_layout(architecture, config.parallel)
    bounds = configured_bounds(config, config.cache.num_pages)
    given, config = max(
        (
            (estimate(StepModel(configured_site(one, architecture, layout, assumed)), bounds, workload), one)
            for one in (replace(config, exchange=ExchangeConfig(capacity_factor=None)), _padded(config))
        ),
        key=lambda pair: pair[0].decode.tokens_per_s,  # prompts are exchanged with exact splits in either
    )
    in_memory = survivable_losses(
        architecture,
        layout,
        replace(configured_terms(config, architecture), device_bytes=None),  # by reload is not asked
        num_nodes=config.nodes.num_nodes,
        least_tokens=1,
    )
    return Found(
        config=config,
        copies=1 if config.parallel.slots_per_rank is None else 2,
        tokens_per_lane=config.cache.num_pages * config.cache.page_tokens,
        nodes_in_memory=in_memory.nodes_in_memory or 0,
        serving=given.serving,
    )


def config_lines(found: Found, workload: Workload) -> Iterator[str]:
    """The best layout as a cluster YAML, with why."""
    config, serving = found.config, found.serving
    parallel = config.parallel
    yield f"# Found by `k2dist plan --search` for prompts of {workload.prompt_len} and outputs of"
    yield f"# {workload.output_len} tokens: an estimated {serving.output_tokens_per_s:,.0f} tokens/s out with"
    yield f"# {serving.concurrency:,} requests at once, a token every {1e3 * serving.tpot_s:.0f} ms; binds:"
    yield f"# {serving.binding}. Nothing of it is measured: see k2dist/planner/assumptions.py."
    yield f"name: {config.name}"
    yield from ("", "parallel:", f"  lanes: {parallel.lanes}", f"  tp: {parallel.tp}")
    if parallel.slots_per_rank is not None:
        yield f"  slots_per_rank: {parallel.slots_per_rank} # every expert twice: a node can be lost"
    yield from ("", "cache:", f"  page_tokens: {config.cache.page_tokens}")
    yield f"  num_pages: {config.cache.num_pages} # {found.tokens_per_lane:,} tokens a lane"
    scheduler = config.scheduler
    yield from ("", "scheduler:", f"  step_tokens: {scheduler.step_tokens}")
    yield from (f"  chunk_tokens: {scheduler.chunk_tokens}", f"  max_running: {scheduler.max_running}")
    factor = "null" if config.capacity_factor is None else f"{config.capacity_factor:g}"
    yield from ("", "exchange:", f"  capacity_factor: {factor}")
    ranks = config.ranks
    yield from ("", "ranks:", f"  rank_cpus: {ranks.rank_cpus:g}", f"  rank_gpus: {ranks.rank_gpus:g}")
    yield f"  threads: {ranks.threads}"
    yield from ("", "nodes:", f"  num_nodes: {config.nodes.num_nodes}", f"  device: {config.nodes.device}")
    yield from ("", "network:", f"  address: {config.network.address}")
    deadlines = config.deadlines
    yield from ("", "deadlines:", f"  start_s: {deadlines.start_s:g}", f"  load_s: {deadlines.load_s:g}")
