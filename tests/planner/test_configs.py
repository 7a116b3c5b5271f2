"""Every committed cluster config can be planned, and its comments say what is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from msgspec.structs import replace

from k2dist.config import KIMI_K2, find_architecture
from k2dist.config.cluster import ClusterConfig, ExchangeConfig
from k2dist.config.load import load_cluster
from k2dist.demo import MODEL_DIR
from k2dist.planner import ClusterPlan, Workload, fitting_workload, plan_cluster

CONFIGS = Path(__file__).resolve().parents[2] / "cluster_configs"
NAMES = (
    "b200-1x8", "cpu-2x2", "cpu-4", "h100-4x8", "h200-16x8", "h200-2x8", "h200-4x8", "laptop", "mi355x-1x8"
)  # fmt: skip


def planned(config: ClusterConfig) -> ClusterPlan:
    model = KIMI_K2 if config.ranks.rank_gpus else str(MODEL_DIR)
    architecture = find_architecture(model)
    return plan_cluster(config, model, architecture, fitting_workload(config, architecture, Workload()))


def test_there_is_a_config_for_each_usual_cluster() -> None:
    assert tuple(sorted(path.stem for path in CONFIGS.glob("*.yaml"))) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_each_is_planned_and_says_why_in_its_first_lines(name: str) -> None:
    path = CONFIGS / f"{name}.yaml"
    config = load_cluster(path)
    plan = planned(config)
    assert plan.cluster == name
    assert path.read_text().startswith("# ")
    assert plan.device.name == (name.split("-")[0] if config.ranks.rank_gpus else "cpu")
    if config.ranks.rank_gpus:  # its name says nodes x devices
        assert f"{plan.num_nodes}x{plan.ranks_per_node}" == name.split("-")[1]
    assert plan.estimate.serving.output_tokens_per_s > 0
    assert plan.ready_s < config.deadlines.start_s + config.deadlines.load_s + config.deadlines.join_s


@pytest.mark.parametrize("name", ["h100-4x8", "h200-16x8", "h200-4x8"])
def test_exact_splits_are_chosen_where_frames_would_send_more(name: str) -> None:
    path = CONFIGS / f"{name}.yaml"
    config = load_cluster(path)
    nodes = replace(config.nodes, device_bytes=200_000_000_000)  # room for frames and graphs
    padded = replace(config, exchange=ExchangeConfig(capacity_factor=1.25), nodes=nodes)
    exact, framed = planned(config), planned(padded)
    told = re.search(r"would send ([\d.]+) times as much\s+for (\d+)", path.read_text().replace("\n# ", " "))
    assert told is not None
    assert float(told[1]) == round(framed.wire.decode_bytes / exact.wire.decode_bytes, 1)
    assert int(told[2]) == exact.estimate.decode.lane_rows
    assert exact.estimate.decode.tokens_per_s > framed.estimate.decode.tokens_per_s
