"""Who computes what: the layout table, experts to slots, and which bytes of a checkpoint each rank reads."""

from k2dist.parallel.capacity import Capacity, CapacityRule
from k2dist.parallel.files import FileMap, StoredTensor, file_maps
from k2dist.parallel.layout import Layout, RankPlace, check_layout, legal_tp
from k2dist.parallel.machines import machine_groups
from k2dist.parallel.placement import configured_layout, expert_homes, first_layout
from k2dist.parallel.published import Published, Share, leftover_tensors, published_tensors
from k2dist.parallel.shard_plan import ByteRuns, ShardPlan, TensorRead, shard_plan, shard_plans

__all__ = [
    "ByteRuns",
    "Capacity",
    "CapacityRule",
    "FileMap",
    "Layout",
    "Published",
    "RankPlace",
    "ShardPlan",
    "Share",
    "StoredTensor",
    "TensorRead",
    "check_layout",
    "configured_layout",
    "expert_homes",
    "file_maps",
    "first_layout",
    "leftover_tensors",
    "legal_tp",
    "machine_groups",
    "published_tensors",
    "shard_plan",
    "shard_plans",
]
