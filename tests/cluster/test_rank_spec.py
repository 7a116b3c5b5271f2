"""How the committed configs decode: what a rank is told follows from its cluster's file."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from k2dist.cluster.rank_spec import rank_spec
from k2dist.cluster.world import World
from k2dist.config import KIMI_K2, find_architecture
from k2dist.config.cluster import ClusterConfig, ExchangeConfig, ParallelConfig, RanksConfig
from k2dist.config.load import load_cluster
from k2dist.engine import RankSpec
from k2dist.ids import WorldRank
from k2dist.parallel import configured_layout
from k2dist.parallel.buckets import Bucket
from k2dist.planner.terms import configured_terms

CONFIGS = Path(__file__).parents[2] / "cluster_configs"
K2 = find_architecture(KIMI_K2)


def spec_of(config: ClusterConfig) -> RankSpec:
    world = World(config=config, model_dir="model", layout=configured_layout(K2, config.parallel))
    return rank_spec(world, WorldRank(0))


@pytest.mark.parametrize("name", ["h200-2x8", "b200-1x8", "mi355x-1x8"])
def test_up_to_sixteen_gpus_decode_in_graphs_and_the_plan_counts_them(name: str) -> None:
    config = load_cluster(CONFIGS / f"{name}.yaml")
    spec = spec_of(config)
    rule = spec.form_rule(K2)
    assert spec.is_recording
    assert (spec.capacity_factor, spec.record_s) == (1.25, 300.0)
    assert rule.padding is not None
    assert rule.padding.factor == 1.25
    assert rule.buckets[0] == Bucket(256, 2048), "every step of generated rows has a size"
    assert configured_terms(config, K2).recorded == rule.buckets


@pytest.mark.parametrize("name", ["h200-4x8", "h100-4x8", "h200-16x8"])
def test_more_gpus_exchange_exactly_and_record_nothing(name: str) -> None:
    config = load_cluster(CONFIGS / f"{name}.yaml")
    assert (spec_of(config).capacity_factor, spec_of(config).form_rule(K2).buckets) == (None, ())
    assert configured_terms(config, K2).recorded == ()
    framed = replace(config, exchange=ExchangeConfig(capacity_factor=1.0))
    assert spec_of(framed).form_rule(K2).buckets == configured_terms(framed, K2).recorded != ()


def test_a_cpu_is_exact_unless_it_is_told_otherwise() -> None:
    config = ClusterConfig(name="cpu", parallel=ParallelConfig(lanes=2, tp=1))
    assert config.capacity_factor is None
    assert replace(config, exchange=ExchangeConfig(capacity_factor=2.0)).capacity_factor == 2.0
    on_gpus = replace(config, ranks=RanksConfig(rank_gpus=1))
    assert on_gpus.capacity_factor == 1.25
    assert replace(on_gpus, exchange=ExchangeConfig(capacity_factor=None)).capacity_factor is None
