"""Rooms of Ray's, counted; and why a placement group waits, in its own numbers."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from k2dist.doctor import Level, diagnose, errors_of
from k2dist.doctor.facts import PlacementGroup, RayNode
from k2dist.doctor.pairings import rounds
from k2dist.doctor.ray_checks import explain
from tests.doctor.machines import CPU_NEEDS, cluster, cpu_node, ray_node

TWO = (ray_node("a", CPU=2.0), ray_node("b", CPU=2.0))


def group(*bundles: dict[str, float], strategy: str = "PACK", state: str = "PENDING") -> PlacementGroup:
    return PlacementGroup(name="ranks", state=state, strategy=strategy, bundles=bundles)


def ray_finding(nodes: tuple[RayNode, ...], **needs: object) -> tuple[Level, str]:
    findings = diagnose(cluster(ray_nodes=nodes), replace(CPU_NEEDS, **needs))
    (found,) = [each for each in findings if each.check == "ray"]
    return found.level, found.what


def test_room_for_all_is_ok() -> None:
    assert ray_finding(TWO) == (Level.OK, "4 ranks x 1 CPU; room for a 2, b 2")


def test_too_little_in_all() -> None:
    level, what = ray_finding((TWO[0], ray_node("b", CPU=1.0)))
    assert (level, what) == (Level.ERROR, "4 ranks x 1 CPU, and its nodes have room for 3: a 2, b 1")


def test_enough_in_all_and_not_on_enough_nodes() -> None:
    level, what = ray_finding((ray_node("a", CPU=3.0), ray_node("b", CPU=1.0)))
    assert level is Level.ERROR
    assert "nodes.num_nodes=2 with 2 ranks each, and 1 nodes have so much room: a 3, b 1" in what
    assert ray_finding((ray_node("a", CPU=3.0), ray_node("b", CPU=1.0)), num_nodes=None)[0] is Level.OK


def test_enough_and_held_by_others() -> None:
    held = replace(TWO[1], free={"CPU": 0.5})
    level, what = ray_finding((TWO[0], held))
    assert (level, what.partition("and ")[2]) == (
        Level.WARNING,
        "what is free now has room for fewer: a 2, b 0",
    )


def test_fractions_that_ray_rounds_fit() -> None:
    nodes = (ray_node("a", CPU=0.3), ray_node("b", CPU=0.3))
    assert ray_finding(nodes, world_size=6, rank_cpus=0.1)[0] is Level.OK


@pytest.mark.parametrize(
    ("waiting", "why"),
    [
        (group({"CPU": 3.0}), "no node has 3 CPU, and a bundle asks for that"),
        (group({"CPU": 1.0, "GPU": 1.0}), "no node has 1 CPU and 1 GPU"),
        (
            group(*[{"CPU": 1.0}] * 3, strategy="STRICT_SPREAD"),
            "each of 3 bundles wants a node of its own, and there are 2",
        ),
        (group({"CPU": 2.0}, {"CPU": 1.0}, strategy="STRICT_PACK"), "and none has 3 CPU"),
        (
            group({"CPU": 1.0}, {"CPU": 1.0}, strategy="STRICT_PACK"),
            "all bundles want one node, and none has 2 CPU free now",
        ),
        (group({"CPU": 1.0}, {"CPU": 1.0}), "2 bundles, 2 CPU, PACK; free now: a 1 CPU, b 0 CPU"),
    ],
)
def test_a_group_that_waits_is_explained(waiting: PlacementGroup, why: str) -> None:
    nodes = (replace(TWO[0], free={"CPU": 1.0}), replace(TWO[1], free={}))
    assert why in explain(waiting, nodes)
    facts = cluster(ray_nodes=TWO, placement_groups=(waiting,))
    (found,) = [each for each in diagnose(facts, None) if each.check == "placement"]
    assert found.level is Level.WARNING
    assert found.what.startswith("group ranks waits: ")


def test_a_group_that_has_its_place_is_not_mentioned() -> None:
    facts = cluster(ray_nodes=TWO, placement_groups=(group({"CPU": 1.0}, state="CREATED"),))
    assert [each for each in diagnose(facts, None) if each.check == "placement"] == []


@pytest.mark.parametrize("count", range(2, 9))
def test_every_pair_meets_once_and_nobody_twice_in_a_round(count: int) -> None:
    nodes = [str(i) for i in range(count)]
    made = rounds(nodes)
    pairs = [frozenset(pair) for each in made for pair in each]
    assert len(pairs) == len(set(pairs)) == count * (count - 1) // 2
    for each in made:
        asked = [node for pair in each for node in pair]
        assert len(asked) == len(set(asked))
    assert len(made) == (count - 1 if count % 2 == 0 else count)


def test_a_machine_alone_is_not_two() -> None:
    alone = replace(cluster(cpu_node()), ray_nodes=None)
    (found,) = errors_of(diagnose(alone, CPU_NEEDS))
    assert (found.check, found.what) == ("ray", "this machine alone, and nodes.num_nodes=2")
    assert errors_of(diagnose(alone, replace(CPU_NEEDS, num_nodes=None))) == ()
