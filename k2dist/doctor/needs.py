"""What one cluster asks of its machines, worked out from its config and its model's dimensions."""

from __future__ import annotations

import math

from k2dist.config.architecture import Architecture
from k2dist.config.cluster import ClusterConfig
from k2dist.messages import Message
from k2dist.parallel import Layout
from k2dist.planner import configured_terms, plan_memory


class Needs(Message, frozen=True, kw_only=True):
    """`rank_bytes`: weights, pages and work space of the fullest rank, without the reserve. `read_bytes`: of
    the checkpoint's files, by the rank that reads most."""

    world_size: int
    num_nodes: int | None  # None: as many as Ray likes
    rank_cpus: float
    rank_gpus: float
    rank_bytes: int
    reserve_bytes: int
    read_bytes: int
    load_s: float
    num_exchanges: int  # of each step: there and back for every MoE layer
    address: str  # network.address
    object_store_bytes: int | None  # of a Ray that k2dist will start; None: it joins one
    allows_mix: bool

    @property
    def rank_resources(self) -> dict[str, float]:
        """In Ray's words."""
        gpus = {"GPU": self.rank_gpus} if self.rank_gpus else {}
        return {"CPU": self.rank_cpus} | gpus

    def ranks_on_a_node(self, num_hosts: int) -> int:
        """At most, if they spread as evenly as they can over `num_hosts` nodes."""
        return math.ceil(self.world_size / (self.num_nodes or max(num_hosts, 1)))


def needs_of(config: ClusterConfig, architecture: Architecture, layout: Layout, *, joins_ray: bool) -> Needs:
    """Of `config` over this model. Raises `LayoutError` for a layout that is not legal."""
    terms = configured_terms(config, architecture)
    plan = plan_memory(architecture, layout, terms)
    rank = max(plan.ranks, key=lambda rank: rank.fixed_bytes + config.cache.num_pages * rank.page_bytes)
    return Needs(
        world_size=layout.world_size,
        num_nodes=config.nodes.num_nodes,
        rank_cpus=config.ranks.rank_cpus,
        rank_gpus=config.ranks.rank_gpus,
        rank_bytes=rank.fixed_bytes - rank.reserve + config.cache.num_pages * rank.page_bytes,
        reserve_bytes=rank.reserve,
        read_bytes=max(each.read_bytes for each in plan.ranks),
        load_s=config.deadlines.load_s,
        num_exchanges=2 * architecture.num_moe_layers,
        address=config.network.address,
        object_store_bytes=None if joins_ray else config.ray.object_store_bytes,
        allows_mix=config.ranks.allow_mix,
    )
