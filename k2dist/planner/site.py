"""Where a model is served: what an estimate of time stands on, from config, layout and device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from statistics import fmean

from k2dist.config.architecture import Architecture
from k2dist.config.cluster import ClusterConfig
from k2dist.errors import LayoutError
from k2dist.parallel import CapacityRule, Layout
from k2dist.planner.assumptions import ASSUMED, Assumptions
from k2dist.planner.devices import Device, configured_device
from k2dist.planner.work import row_bytes


@dataclass(frozen=True, kw_only=True)
class Site:
    """All lanes are alike, and ranks of a layer hold `slots` of its `all_slots` on average.

    `ranks_per_node`: neighbouring ranks share a node. `padding`: of steps without prompts; None: exact.
    """

    architecture: Architecture
    device: Device
    lanes: int
    tp: int
    world_size: int
    ranks_per_node: int
    slots: float
    all_slots: int
    padding: CapacityRule | None
    stream_bytes: int
    assumed: Assumptions = ASSUMED

    @property
    def is_cpu(self) -> bool:
        return self.device.name == "cpu"

    @property
    def num_nodes(self) -> int:
        return -(-self.world_size // self.ranks_per_node)

    @property
    def far_share(self) -> float:
        """Of what goes to other ranks, evenly: how much leaves the node."""
        if self.world_size == 1:
            return 0.0
        return max(self.world_size - self.ranks_per_node, 0) / (self.world_size - 1)

    @property
    def rank_share(self) -> float:
        """Of the device's rates: a CPU is shared by all ranks of its node."""
        return 1 / self.ranks_per_node if self.is_cpu else 1.0

    @cached_property
    def sent_row_bytes(self) -> int:
        return row_bytes(self.architecture, self.stream_bytes)

    def own_rows(self, num_rows: int) -> int:
        """Of a lane's rows, the largest share of one rank."""
        return -(-num_rows // self.tp)


def configured_site(
    config: ClusterConfig, architecture: Architecture, layout: Layout, assumed: Assumptions = ASSUMED
) -> Site:
    """Raises `ConfigError` if the device is not known, `LayoutError` if it cannot compute this model."""
    device = configured_device(config)
    check_float8(device, architecture, config)
    factor = config.capacity_factor
    counts = [len(experts) for place in layout.ranks for experts in place.experts[:1]]
    return Site(
        architecture=architecture,
        device=device,
        lanes=layout.num_lanes,
        tp=layout.tp,
        world_size=layout.world_size,
        ranks_per_node=ranks_per_node(config, layout.world_size, device),
        slots=fmean(counts) if counts else 0.0,
        all_slots=sum(counts),
        padding=None if factor is None or not counts else CapacityRule.of(architecture, layout, factor),
        stream_bytes=2 if config.dtype == "bfloat16" else 4,
        assumed=assumed,
    )


def ranks_per_node(config: ClusterConfig, world_size: int, device: Device) -> int:
    """As configured; else as many GPUs as such nodes have, or all ranks on one machine without GPUs."""
    if config.nodes.num_nodes is not None:
        return world_size // config.nodes.num_nodes
    return world_size if device.name == "cpu" else min(world_size, device.node_devices)


def check_float8(device: Device, architecture: Architecture, config: ClusterConfig) -> None:
    """Raises `LayoutError` if weights are float8 and the device has none, or another kind of it."""
    if architecture.scale_block is None or config.kernels == "reference" or device.float8 == "e4m3fn":
        return
    has = "no float8" if device.float8 == "none" else f"e4m3 of the {device.float8.removeprefix('e4m3')} kind"
    raise LayoutError(
        f"nodes.device={device.name}: it has {has}, and the checkpoint's weights and the kernels' "
        f"activations are e4m3fn; use h100, h200, b200 or mi355x"
    )
