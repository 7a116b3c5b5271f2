"""Ranks that have to share a machine do, and every rank has one."""

from __future__ import annotations

import pytest

from k2dist.config import find_architecture
from k2dist.config.cluster import ParallelConfig
from k2dist.parallel import configured_layout, machine_groups

K2 = find_architecture("kimi-k2-instruct")


@pytest.mark.parametrize("num_nodes", [None, 1, 2, 4])
@pytest.mark.parametrize(("lanes", "tp", "alone"), [(16, 1, 0), (4, 4, 0), (2, 4, 8), (1, 16, 0)])
def test_every_rank_is_in_one_group(num_nodes: int | None, lanes: int, tp: int, alone: int) -> None:
    layout = configured_layout(K2, ParallelConfig(lanes=lanes, tp=tp, expert_only_ranks=alone))
    groups = machine_groups(layout, num_nodes)
    assert sorted(rank for group in groups for rank in group) == list(range(16))
    assert len(groups) == (lanes + alone if num_nodes is None else num_nodes)


def test_a_lane_is_together_unless_the_machines_are_counted() -> None:
    layout = configured_layout(K2, ParallelConfig(lanes=2, tp=4, expert_only_ranks=2))
    assert machine_groups(layout, None) == ((0, 1, 2, 3), (4, 5, 6, 7), (8,), (9,))
    assert machine_groups(layout, 2) == ((0, 1, 2, 3, 4), (5, 6, 7, 8, 9))
