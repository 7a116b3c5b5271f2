"""Who computes what: the layout table, experts to slots, and which bytes of a checkpoint each rank reads."""

from k2dist.parallel.layout import Layout, RankPlace, check_layout, legal_tp
from k2dist.parallel.placement import expert_homes, first_layout
from k2dist.parallel.published import Published, Share, leftover_tensors, published_tensors
from k2dist.parallel.shard_plan import ShardPlan, Skip, TensorRead, shard_plan

__all__ = [
    "Layout",
    "Published",
    "RankPlace",
    "ShardPlan",
    "Share",
    "Skip",
    "TensorRead",
    "check_layout",
    "expert_homes",
    "first_layout",
    "leftover_tensors",
    "legal_tp",
    "published_tensors",
    "shard_plan",
]
