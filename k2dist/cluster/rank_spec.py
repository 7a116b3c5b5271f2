"""What the cluster's plan says of one rank, in the engine's terms."""

from __future__ import annotations

from k2dist.cluster.world import World
from k2dist.engine import RankSpec
from k2dist.ids import WorldRank
from k2dist.scheduler import Limits


def rank_spec(world: World, world_rank: WorldRank) -> RankSpec:
    config = world.config
    return RankSpec(
        model_dir=world.model_dir,
        layout=world.layout,
        world_rank=world_rank,
        page_tokens=config.cache.page_tokens,
        num_pages=config.cache.num_pages,
        limits=Limits.of(config),
        kernels=config.kernels,
        dtype=config.dtype,
        capacity_factor=config.capacity_factor,
        retain_s=config.service.retain_s,
        device="cuda" if config.ranks.rank_gpus > 0 else "cpu",
        experts_device=config.ranks.experts_device,
        graphs=config.ranks.graphs,
        record_s=config.deadlines.record_s,
        split_tokens=config.exchange.split_tokens,
    )
