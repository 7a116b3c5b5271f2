"""The plan of a cluster: config and model, and what each rank is told."""

from pathlib import Path

import pytest

from k2dist.cluster.rank_spec import rank_spec
from k2dist.cluster.world import plan_world
from k2dist.config.cluster import ClusterConfig
from k2dist.config.load import parse_cluster
from k2dist.errors import CheckpointError, LayoutError
from k2dist.ids import WorldRank


def config(**parallel: int) -> ClusterConfig:
    fields = ", ".join(f"{name}: {value}" for name, value in parallel.items())
    return parse_cluster(
        f"name: a\nparallel: {{{fields}}}\n"
        "scheduler: {step_tokens: 40, max_running: 20, chunk_tokens: 30, ageing_s: 7}\n"
        "cache: {page_tokens: 8, num_pages: 12, reuse_generated: true}\n"
        "ranks: {rank_cpus: 0.25}\nservice: {retain_s: 3}",
        "test",
    )


def test_lanes_are_scheduled_by_their_first_rank(tiny_model_dir: Path) -> None:
    world = plan_world(config(lanes=2, tp=2, expert_only_ranks=1), tiny_model_dir)
    assert world.first_ranks() == (0, 2)
    assert world.layout.world_size == 5
    assert world.num_cpus == 1.25
    assert world.num_gpus == 0


def test_ranks_are_told_an_absolute_path(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny_model_dir.parent)
    world = plan_world(config(lanes=1, tp=1), Path(tiny_model_dir.name))
    assert world.model_dir == str(tiny_model_dir)


def test_a_rank_gets_what_the_config_says(tiny_model_dir: Path) -> None:
    spec = rank_spec(plan_world(config(lanes=2, tp=2), tiny_model_dir), WorldRank(3))
    assert (spec.world_rank, spec.page_tokens, spec.num_pages, spec.retain_s) == (3, 8, 12, 3.0)
    assert (spec.limits.step_tokens, spec.limits.max_running, spec.limits.chunk_tokens) == (40, 20, 30)
    assert (spec.limits.ageing_s, spec.limits.reuse_generated) == (7.0, True)
    assert (spec.kernels, spec.dtype) == ("auto", "bfloat16")


def test_a_layout_that_cannot_be_cut_is_refused_with_the_arithmetic(tiny_model_dir: Path) -> None:
    with pytest.raises(LayoutError, match=r"num_attention_heads 8 / 3"):
        plan_world(config(lanes=1, tp=3), tiny_model_dir)
    with pytest.raises(LayoutError, match=r"13 ranks for 12 experts"):
        plan_world(config(lanes=13, tp=1), tiny_model_dir)


def test_a_model_that_is_not_there_is_refused_by_path(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nosuch: no such directory"):
        plan_world(config(lanes=1, tp=1), tmp_path / "nosuch")
