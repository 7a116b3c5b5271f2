"""What machines lack is said with the arithmetic, before anything is asked of Ray."""

from __future__ import annotations

from pathlib import Path

from k2dist.cluster.placement import shortage
from k2dist.cluster.world import World, plan_world
from k2dist.config.load import parse_cluster

HEAD = {"memory": 8e9}  # a node that hands out neither CPUs nor GPUs
SMALL = {"CPU": 4.0, "GPU": 1.0}
LARGE = {"CPU": 16.0, "GPU": 2.0}


def world(model_dir: Path, nodes: str = "{}", rank_gpus: int = 1) -> World:
    text = (
        "name: a\nparallel: {lanes: 2, tp: 2}\n"
        f"ranks: {{rank_cpus: 2, rank_gpus: {rank_gpus}}}\nnodes: {nodes}"
    )
    return plan_world(parse_cluster(text, "test"), model_dir)


def test_ranks_that_fit_lack_nothing(tiny_model_dir: Path) -> None:
    assert shortage(world(tiny_model_dir), [HEAD, LARGE, LARGE]) is None
    assert shortage(world(tiny_model_dir, "{num_nodes: 2}"), [HEAD, LARGE, LARGE]) is None
    assert shortage(world(tiny_model_dir, rank_gpus=0), [{"CPU": 8.0}]) is None


def test_too_little_in_all_is_a_sum(tiny_model_dir: Path) -> None:
    missing = shortage(world(tiny_model_dir), [HEAD, LARGE, SMALL])
    assert missing is not None
    assert "4 ranks x 1 GPU = 4 GPU, and Ray has 3;" in missing
    assert "4 ranks x 2 CPU = 8 CPU, and Ray has 0;" in str(shortage(world(tiny_model_dir), [HEAD]))


def test_enough_in_all_but_in_pieces_is_too_little(tiny_model_dir: Path) -> None:
    """Four machines with a GPU each cannot hold lanes of two."""
    missing = str(shortage(world(tiny_model_dir), [SMALL] * 4))
    assert "2 ranks have to be on one machine (their lane is), so 1 machines with 4 CPU and 2 GPU" in missing
    assert "Ray has 0 of 4" in missing


def test_machines_that_are_counted_have_to_be_there(tiny_model_dir: Path) -> None:
    """One machine with room for all ranks is not the two that the config says."""
    two = world(tiny_model_dir, "{num_nodes: 2}")
    missing = str(shortage(two, [{"CPU": 64.0, "GPU": 8.0}, SMALL]))
    assert "2 machines with 4 CPU and 2 GPU each are needed, and Ray has 1 of 2" in missing
    assert "neighbouring ranks are" in missing
