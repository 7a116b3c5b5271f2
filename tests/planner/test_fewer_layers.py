"""The first layers of a model as a model of its own, and how many of them fit."""

from __future__ import annotations

import pytest

from k2dist.config import KIMI_K2, find_architecture
from k2dist.parallel import check_layout, first_layout, shard_plan
from k2dist.planner import Terms, plan_memory, triton_form
from k2dist.planner.fewer_layers import fewest_layers, first_layers, fit_of, most_layers, reads_by_layer

K2 = find_architecture(KIMI_K2)
EP16 = first_layout(K2, lanes=8, tp=1, expert_only_ranks=8)
TERMS = Terms(
    form=triton_form(), page_tokens=64, step_tokens=64, max_samples=64, reserve_bytes=0, device_bytes=None
)


def test_few_layers_are_a_legal_model_whose_reads_are_the_first_of_the_whole() -> None:
    six, six_layout = first_layers(K2, EP16, 6)  # of 61: every shard plan takes a while
    few, layout = first_layers(six, six_layout, 3)
    check_layout(few, layout)
    for rank in (0, 15):
        some = shard_plan(few, layout, rank).reads
        names = {read.name for read in some}
        layers = tuple(f"model.layers.{n}." for n in range(3, 6))
        whole = shard_plan(six, six_layout, rank).reads
        assert some == tuple(read for read in whole if not read.name.startswith(layers))
        assert set(reads_by_layer(some)) == ({None, 0, 1, 2} if rank == 0 else {1, 2})
        assert len(names) == len(some)


def test_all_layers_are_the_plan_itself() -> None:
    fit = fit_of(K2, EP16, TERMS, 0, 61, num_pages=10)
    assert fit.memory == plan_memory(K2, EP16, TERMS).ranks[0]
    assert fit.laying_out == (163840 + 1) * 7168 * 2, "head and last norm are more than a layer"
    assert fit.needed_bytes == fit.memory.fixed_bytes + 10 * fit.memory.page_bytes + fit.laying_out


@pytest.mark.parametrize("rank", [0, 15])
def test_as_many_layers_as_fit_and_not_one_more(rank: int) -> None:
    for num_layers in (2, 3, 30, 61):
        needed = fit_of(K2, EP16, TERMS, rank, num_layers, num_pages=10).needed_bytes
        for free, expected in ((needed, num_layers), (needed - 1, num_layers - 1)):
            found = most_layers(K2, EP16, TERMS, rank, 10, free)
            assert (found.num_layers if found else 1) == expected


def test_a_rank_without_a_lane_has_no_pages() -> None:
    assert fit_of(K2, EP16, TERMS, 15, 2, num_pages=10).num_pages == 0


def test_fewest_is_a_layer_of_each_sort() -> None:
    assert fewest_layers(K2) == 2
