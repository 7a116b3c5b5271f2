"""A search ranks what is legal and fits, and its config is one that `plan` accepts."""

from __future__ import annotations

import pytest

from k2dist.config import Architecture
from k2dist.config.load import parse_cluster
from k2dist.errors import LayoutError, UsageError
from k2dist.planner import Workload, plan_cluster
from k2dist.planner.devices import DEVICES
from k2dist.planner.search import Hardware, config_lines, search


def machines(device: str, nodes: int) -> Hardware:
    return Hardware(device=DEVICES[device], nodes=nodes, gpus=8)


def test_the_best_config_is_accepted_and_gives_what_was_promised(k2: Architecture) -> None:
    workload = Workload(prompt_len=1000, output_len=1000, target_tpot_s=0.08)
    found = search(k2, machines("h200", 2), workload)
    rates = [one.serving.output_tokens_per_s for one in found]
    assert rates == sorted(rates, reverse=True)
    assert all(one.serving.tpot_s <= 0.08 for one in found)
    for one in (found[0], found[-1]):
        config = parse_cluster("\n".join(config_lines(one, workload)), "found")
        assert config == one.config
        plan = plan_cluster(config, "kimi-k2-instruct", k2, workload)
        assert plan.estimate.serving == one.serving
        assert plan.memory.num_tokens is not None
        assert one.tokens_per_lane <= plan.memory.num_tokens


def test_one_node_of_h200_is_found_too_small_for_lanes_of_one_rank(k2: Architecture) -> None:
    """126.87 GB of experts, and all of attention, embedding and head beside them; with two ranks, frames and
    graphs leave no room for a context."""
    found = search(k2, machines("h200", 1), Workload(prompt_len=1000, output_len=100))
    assert {one.config.parallel.tp for one in found} == {4, 8}


def test_second_copies_are_tried_where_they_let_a_node_die(k2: Architecture) -> None:
    found = search(k2, machines("h200", 4), Workload())
    doubled = [one for one in found if one.copies == 2]
    assert doubled
    assert all(one.nodes_in_memory >= 1 for one in doubled)
    assert all(one.nodes_in_memory == 0 for one in found if one.copies == 1)


def test_each_layout_takes_the_exchange_that_decodes_faster(k2: Architecture) -> None:
    few = search(k2, machines("b200", 1), Workload(prompt_len=100, output_len=1000))
    assert {one.config.exchange.capacity_factor for one in few} == {1.25}


def test_machines_that_hold_nothing_are_refused(k2: Architecture) -> None:
    with pytest.raises(LayoutError, match="1 x 8 h100: no legal layout holds the weights"):
        search(k2, machines("h100", 1), Workload())
    with pytest.raises(UsageError, match=r"none of \d+ layouts that fit does what is asked"):
        search(k2, machines("h200", 2), Workload(target_tpot_s=0.001))
