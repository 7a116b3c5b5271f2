"""What may be lost: by trying every choice on small tables, and on K2 against known arithmetic."""

from itertools import combinations

import msgspec
import pytest

from k2dist.config import Architecture
from k2dist.parallel import Layout, first_layout
from k2dist.planner import Losses, Terms, plan_memory, survivable_losses, triton_form

H200, H100 = 150_000_000_000, 84_900_000_000


def terms(device_bytes: int | None) -> Terms:
    return Terms(
        form=triton_form(),
        page_tokens=64,
        step_tokens=4096,
        max_samples=256,
        reserve_bytes=8 * 2**30,
        device_bytes=device_bytes,
    )


def losses_of(
    k2: Architecture, lanes: int, tp: int, num_nodes: int, device_bytes: int | None, slots: int | None = None
) -> Losses:
    layout = first_layout(k2, lanes=lanes, tp=tp, slots_per_rank=slots)
    return survivable_losses(
        k2, layout, terms(device_bytes), num_nodes=num_nodes, least_tokens=k2.max_positions
    )


@pytest.mark.parametrize(
    ("lanes", "tp", "slots"), [(4, 1, 3), (4, 1, 6), (4, 1, 12), (2, 2, 6), (6, 1, 6), (2, 4, 8)]
)
@pytest.mark.parametrize("ranks_per_node", [1, 2])
def test_weights_stay_in_memory_whatever_is_lost(
    small: Architecture, lanes: int, tp: int, slots: int, ranks_per_node: int
) -> None:
    """Every choice of that many is survived, and some choice of one more is not."""
    layout = first_layout(small, lanes=lanes, tp=tp, slots_per_rank=slots)
    num_nodes = layout.world_size // ranks_per_node
    found = survivable_losses(small, layout, terms(None), num_nodes=num_nodes, least_tokens=1)
    limit = found.nodes_in_memory
    assert limit is not None
    if ranks_per_node == 1:
        assert limit == found.ranks_in_memory
    nodes = [range(n * ranks_per_node, (n + 1) * ranks_per_node) for n in range(num_nodes)]
    for count, is_survived in ((limit, True), (limit + 1, False)):
        results = [
            holds_everything(small, layout, {rank for node in lost for rank in node})
            for lost in combinations(nodes, count)
        ]
        assert all(results) == is_survived


def holds_everything(architecture: Architecture, layout: Layout, lost: set[int]) -> bool:
    left = [rank for rank in layout.ranks if rank.world_rank not in lost]
    has_slices = {rank.tp_rank for rank in left} >= set(range(layout.tp))
    return has_slices and all(
        set().union(*(rank.experts[layer] for rank in left)) == set(range(architecture.num_experts))
        for layer in range(architecture.num_moe_layers)
    )


def test_two_nodes_of_h200_lose_ranks_and_not_a_node(k2: Architecture) -> None:
    """126.87 GB of experts a rank leave no full context beside them on eight."""
    for lanes, tp in ((16, 1), (2, 8)):
        losses = losses_of(k2, lanes, tp, 2, H200)
        assert losses.ranks_by_reload is not None
        assert losses.ranks_by_reload >= 6
        assert (losses.nodes_by_reload, losses.ranks_in_memory, losses.nodes_in_memory) == (0, 0, 0)


def test_two_nodes_of_h100_lose_nothing(k2: Architecture) -> None:
    losses = losses_of(k2, 1, 16, 2, H100)
    assert (losses.ranks_by_reload, losses.nodes_by_reload) == (0, 0)


def test_four_nodes_of_h100_lose_one(k2: Architecture) -> None:
    assert losses_of(k2, 16, 2, 4, H100).nodes_by_reload == 1


def test_second_copies_on_other_nodes_survive_a_node_in_memory(k2: Architecture) -> None:
    losses = losses_of(k2, 128, 1, 16, H200, slots=6)
    assert (losses.ranks_in_memory, losses.nodes_in_memory) == (1, 1)
    assert losses_of(k2, 128, 1, 16, H200).nodes_in_memory == 0


def test_a_remainder_is_the_plan_of_its_layout(k2: Architecture) -> None:
    """Each stated remainder, laid out for itself, has the tokens that it says."""
    losses = losses_of(k2, 2, 8, 2, H200)
    assert len(losses.rank_remainders) == (losses.ranks_by_reload or 0) + 1
    for remainder in losses.rank_remainders[:-1]:
        layout = first_layout(k2, lanes=remainder.lanes, tp=8, expert_only_ranks=remainder.expert_only_ranks)
        assert layout.world_size == 16 - remainder.num_ranks_lost
        plan = plan_memory(k2, layout, terms(H200))
        assert plan.num_tokens is not None
        assert remainder.num_tokens is not None
        assert 0.99 < remainder.num_tokens / plan.num_tokens <= 1
        assert remainder.num_tokens >= k2.max_positions
    last = losses.rank_remainders[-1]
    assert last.num_tokens is None or last.num_tokens < k2.max_positions


def test_fewer_lanes_are_tried_before_a_loss_is_called_too_much(k2: Architecture) -> None:
    losses = losses_of(k2, 16, 1, 2, H200)
    assert any(remainder.expert_only_ranks > 0 for remainder in losses.rank_remainders[:-1])


def test_one_lane_of_many_ranks_cannot_lose_one_in_memory(small: Architecture) -> None:
    """Even with every expert on every rank: its slice of attention lies nowhere else."""
    layout = first_layout(small, lanes=1, tp=4, slots_per_rank=12)
    found = survivable_losses(small, layout, terms(None), num_nodes=None, least_tokens=1)
    assert (found.ranks_in_memory, found.nodes_in_memory, found.ranks_by_reload) == (0, None, None)


def test_losses_are_said_and_cross_processes(k2: Architecture) -> None:
    losses = losses_of(k2, 16, 2, 4, H100)
    assert (
        str(losses).splitlines()[1]
        == "  0 ranks, 0 of 4 nodes, with every weight still in a survivor's memory"
    )
    assert "1 of 4 nodes, if survivors read their new parts from the checkpoint" in str(losses)
    assert "2 nodes are too many: " in str(losses)
    assert msgspec.json.decode(msgspec.json.encode(losses), type=Losses) == losses
