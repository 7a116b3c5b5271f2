"""What machines lack is said with the arithmetic, before anything is asked of Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from k2dist.cluster import placement
from k2dist.cluster.placement import bundle_of, reserve, shortage
from k2dist.cluster.world import World, plan_world
from k2dist.config.load import parse_cluster
from k2dist.errors import CapacityError
from k2dist.ids import WorldRank

HEAD = {"memory": 8e9}  # a node that hands out neither CPUs nor GPUs
SMALL = {"CPU": 4.0, "GPU": 1.0}
LARGE = {"CPU": 16.0, "GPU": 2.0}


def world(model_dir: Path, nodes: str = "{}", rank_gpus: int = 1, deadlines: str = "{}") -> World:
    text = (
        "name: a\nparallel: {lanes: 2, tp: 2}\n"
        f"ranks: {{rank_cpus: 2, rank_gpus: {rank_gpus}}}\n"
        f"nodes: {nodes}\ndeadlines: {deadlines}"
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


@pytest.mark.parametrize(
    ("nodes", "strategy", "bundles"),
    [("{}", "PACK", [0, 0, 1, 1]), ("{num_nodes: 4}", "STRICT_SPREAD", [0, 1, 2, 3])],
)
def test_ray_is_asked_for_a_bundle_where_ranks_belong_together(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, nodes: str, strategy: str, bundles: list[int]
) -> None:
    asked: list[tuple[list[dict[str, float]], dict[str, Any]]] = []
    monkeypatch.setattr(placement, "_nodes", lambda: [LARGE] * 4)
    monkeypatch.setattr(placement, "placement_group", lambda what, **how: asked.append((what, how)))
    small = world(tiny_model_dir, nodes)
    reserve(small)
    ((what, how),) = asked
    each = 4 // len(what)
    assert what == [{"CPU": 2 * each, "GPU": each}] * (max(bundles) + 1)
    assert (how["strategy"], how["lifetime"]) == (strategy, "detached")
    group: Any = object()
    strategies = [bundle_of(group, small, WorldRank(rank)) for rank in range(4)]
    assert [strategy.placement_group_bundle_index for strategy in strategies] == bundles


def test_nothing_is_asked_for_that_cannot_be(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "_nodes", lambda: [HEAD])
    with pytest.raises(CapacityError, match="4 ranks x 2 CPU = 8 CPU, and Ray has 0"):
        reserve(world(tiny_model_dir))


def test_machines_are_waited_for_as_long_as_the_configuration_says(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default not at all."""
    looks = iter([[HEAD], [HEAD, LARGE], [HEAD, LARGE, LARGE]])
    monkeypatch.setattr(placement, "_nodes", lambda: next(looks))
    monkeypatch.setattr(placement, "_LOOK_S", 0.0)
    told: list[str] = []
    patient = world(tiny_model_dir)
    with pytest.raises(CapacityError):
        placement.await_capacity(patient, told.append)
    assert told == []
    patient = world(tiny_model_dir, deadlines="{nodes_s: 60}")
    placement.await_capacity(patient, told.append)
    assert told == ["waiting for machines: the layout needs 4 ranks x 1 GPU = 4 GPU, and Ray has 2"]
