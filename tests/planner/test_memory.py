"""What fits is counted, and what does not is refused with the arithmetic."""

import re
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest

from k2dist.config import Architecture
from k2dist.config.load import load_cluster
from k2dist.errors import LayoutError
from k2dist.ids import ExpertId
from k2dist.parallel import configured_layout, first_layout
from k2dist.planner import (
    Kind,
    MemoryPlan,
    Terms,
    check_memory,
    configured_terms,
    plan_memory,
    reference_form,
    triton_form,
)

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "cluster_configs").glob("*.yaml"))
H200, H100, B200 = 150_000_000_000, 84_900_000_000, 191_500_000_000
FULL_CONTEXT = 131_072 // 64  # pages


def terms(device_bytes: int | None, **changes: object) -> Terms:
    base = Terms(
        form=triton_form(),
        page_tokens=64,
        step_tokens=4096,
        max_samples=256,
        reserve_bytes=8 * 2**30,
        device_bytes=device_bytes,
    )
    return msgspec.structs.replace(base, **changes)


def plan_of(k2: Architecture, lanes: int, tp: int, device_bytes: int | None, **changes: object) -> MemoryPlan:
    return plan_memory(k2, first_layout(k2, lanes=lanes, tp=tp), terms(device_bytes, **changes))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_committed_configs_fit_k2_where_their_devices_are_known(k2: Architecture, path: Path) -> None:
    config = load_cluster(path)
    layout = configured_layout(k2, config.parallel)
    plan = plan_memory(k2, layout, configured_terms(config, k2))
    check_memory(plan, config.cache.num_pages)
    assert (plan.num_pages is None) == (path.stem in ("laptop", "cpu-4", "cpu-2x2"))
    if plan.num_pages is not None:  # neither is there much more room than is used
        assert 0.95 * plan.num_pages < config.cache.num_pages <= plan.num_pages
        assert config.cache.num_pages * config.cache.page_tokens >= k2.max_positions


def test_comments_of_committed_configs_say_what_is_so(k2: Architecture) -> None:
    """Tokens, full contexts and gigabytes of a lane's cache."""
    num_checked = 0
    for path in CONFIGS:
        found = re.search(
            r"# ([\d,]+) tokens a lane, ([\d.]+) full contexts; (\d+) GB a rank", path.read_text()
        )
        if found is not None:
            cache = load_cluster(path).cache
            num_tokens = cache.num_pages * cache.page_tokens
            assert int(found[1].replace(",", "")) == num_tokens
            assert float(found[2]) == int(num_tokens / k2.max_positions * 10) / 10
            assert int(found[3]) == round(num_tokens * 70_272 / 1e9)
            num_checked += 1
    assert num_checked == 6


@pytest.mark.parametrize(
    ("lanes", "tp", "device_bytes"),
    [
        (8, 1, H200),  # 126.87 GB of experts, and all else on every rank
        (8, 1, H100),
        (1, 8, H100),
        (16, 1, H100),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    k2: Architecture, lanes: int, tp: int, device_bytes: int
) -> None:
    plan = plan_of(k2, lanes, tp, device_bytes)
    assert plan.num_pages == 0
    with pytest.raises(LayoutError, match="does not fit its device, before any page") as caught:
        check_memory(plan, num_pages=1)
    parts, _, total = str(caught.value).partition(" = ")
    numbers = [float(number) for number in re.findall(r"([\d.]+) GB", parts)]
    assert sum(numbers) == pytest.approx(float(total.split()[0]), abs=0.01 * len(numbers))
    assert {8: "experts 126.87 GB", 16: "experts 63.43 GB"}[lanes * tp] in parts
    assert f"of {lanes * tp} ranks" in total


@pytest.mark.parametrize(("lanes", "tp", "device_bytes"), [(1, 8, H200), (1, 16, H100)])
def test_k2_at_128k_is_refused_where_only_a_part_of_one_context_is_left(
    k2: Architecture, lanes: int, tp: int, device_bytes: int
) -> None:
    """8 H200 (Kimi-K2#76) and 16 H100: the weights fit, one sequence of 131,072 tokens does not."""
    plan = plan_of(k2, lanes, tp, device_bytes)
    assert plan.num_tokens is not None
    assert 60_000 < plan.num_tokens < 131_072
    message = (
        rf"cache.num_pages=2048: 2,048 pages x 4,497,408 bytes = 9\.21 GB for 131,072 tokens, .* "
        rf"use at most {plan.num_pages} pages \({plan.num_tokens:,} tokens\)"
    )
    with pytest.raises(LayoutError, match=message):
        check_memory(plan, FULL_CONTEXT)


@pytest.mark.parametrize(
    ("lanes", "tp", "device_bytes"), [(16, 1, H200), (1, 16, H200), (2, 4, B200), (16, 2, H100)]
)
def test_k2_at_128k_is_accepted_where_it_fits(
    k2: Architecture, lanes: int, tp: int, device_bytes: int
) -> None:
    check_memory(plan_of(k2, lanes, tp, device_bytes), FULL_CONTEXT)


def test_the_pages_that_fit_are_accepted_and_one_more_is_not(k2: Architecture) -> None:
    plan = plan_of(k2, 16, 1, H200)
    assert plan.num_pages is not None
    check_memory(plan, plan.num_pages)
    with pytest.raises(LayoutError, match=f"use at most {plan.num_pages} pages"):
        check_memory(plan, plan.num_pages + 1)


def test_pages_fill_the_device_to_less_than_one_page(k2: Architecture) -> None:
    plan = plan_of(k2, 2, 8, H200)
    assert plan.num_pages is not None
    rank = plan.fullest
    left = H200 - rank.fixed_bytes - plan.num_pages * rank.page_bytes
    assert 0 <= left < rank.page_bytes


def test_tp_divides_attention_and_never_the_cache(k2: Architecture) -> None:
    one, eight = plan_of(k2, 8, 1, None).ranks[0], plan_of(k2, 1, 8, None).ranks[0]
    assert one.page_bytes == eight.page_bytes
    assert one.weights[Kind.EMBEDDING] == 8 * eight.weights[Kind.EMBEDDING]
    assert eight.weights[Kind.ATTENTION] < one.weights[Kind.ATTENTION] < 8 * eight.weights[Kind.ATTENTION]
    for kind in (Kind.EXPERTS, Kind.SHARED_EXPERT, Kind.ROUTER, Kind.NORMS):
        assert one.weights[kind] == eight.weights[kind]


def test_a_rank_without_a_lane_holds_experts_and_their_exchange(k2: Architecture) -> None:
    layout = first_layout(k2, lanes=1, tp=8, expert_only_ranks=8)
    plan = plan_memory(k2, layout, terms(H200))
    alone = plan.ranks[15]
    assert alone.parts().keys() == {"experts", "exchange", "reserve"}
    assert alone.page_bytes == 0
    assert plan.fullest.lane == 0
    assert plan.num_pages == plan_memory(k2, layout, terms(H200)).fullest.free_bytes(H200) // (64 * 70_272)


def test_an_uneven_table_is_decided_by_its_fullest_rank(k2: Architecture) -> None:
    layout = first_layout(k2, lanes=16, tp=1)
    more = tuple((*experts, ExpertId(383)) for experts in layout.ranks[0].experts)
    fuller = msgspec.structs.replace(layout.ranks[0], experts=more)
    plan = plan_memory(k2, msgspec.structs.replace(layout, ranks=(fuller, *layout.ranks[1:])), terms(H200))
    assert plan.fullest.world_rank == 0
    assert plan.num_pages is not None
    assert plan.num_pages == plan.fullest.free_bytes(H200) // plan.fullest.page_bytes
    even = plan_memory(k2, layout, terms(H200)).num_pages
    assert even is not None
    assert even - plan.num_pages == pytest.approx(60 * 0.04405e9 / (64 * 70_272), rel=0.2)


def test_buffers_grow_with_the_step_and_never_past_all_rows(k2: Architecture) -> None:
    exchanges = [plan_of(k2, 16, 1, None, step_tokens=2**n).ranks[0].exchange for n in range(4, 14)]
    assert all(1.9 < after / before < 2.1 for before, after in pairwise(exchanges))
    hot = [plan_of(k2, 16, 1, None, imbalance=x).ranks[0].exchange for x in (1.0, 4.0, 16.0, 1e9)]
    assert hot == sorted(hot)
    assert hot[2] == hot[3]  # every row of all lanes, with all of its experts here


def test_the_reference_kernels_need_four_times_the_memory_for_experts(k2: Architecture) -> None:
    served = plan_of(k2, 16, 1, None).ranks[0].weights[Kind.EXPERTS]
    reference = plan_of(k2, 16, 1, None, form=reference_form()).ranks[0].weights[Kind.EXPERTS]
    assert reference / served == pytest.approx(4, rel=0.001)


def test_nothing_is_refused_where_nothing_is_known(k2: Architecture) -> None:
    plan = plan_of(k2, 1, 1, None)
    assert (plan.num_pages, plan.num_tokens) == (None, None)
    check_memory(plan, 10**9)
    assert "not known" in str(plan)


def test_an_illegal_layout_has_no_memory_plan(k2: Architecture) -> None:
    layout = msgspec.structs.replace(first_layout(k2, lanes=1, tp=16), tp=32)
    with pytest.raises(LayoutError, match="use tp=16"):
        plan_memory(k2, layout, terms(None))


def test_a_plan_prints_a_table_that_adds_up(k2: Architecture) -> None:
    lines = str(plan_of(k2, 16, 1, H200)).splitlines()
    assert lines[0] == "16 ranks, 0 to 15:"
    amounts = [float(line.split(" GB")[0].split()[-1]) for line in lines[1:-1]]
    assert sum(amounts[:-1]) == pytest.approx(amounts[-1], abs=0.01 * len(amounts))
    assert "77.67 GB are read from files" in lines[-2]
    assert lines[-1].startswith(
        "150.00 GB leave 12,169 pages of 4,497,408 bytes: 778,816 tokens a lane, 5.9 "
    )


def test_a_plan_crosses_processes_unchanged(k2: Architecture) -> None:
    plan = plan_of(k2, 2, 8, H200)
    assert msgspec.json.decode(msgspec.json.encode(plan), type=MemoryPlan) == plan


def test_experts_in_the_machines_memory_take_none_of_the_device(k2: Architecture) -> None:
    """And the plan's other parts stay what they are: one lane of tp 8 then needs 8 devices of 40 GB."""
    layout = first_layout(k2, lanes=1, tp=8)
    here, away = (
        plan_memory(k2, layout, terms(None, are_experts_here=are)).ranks[0] for are in (True, False)
    )
    assert here.weights[Kind.EXPERTS] > 100 * 10**9
    assert away.weight_bytes == here.weight_bytes - here.weights[Kind.EXPERTS]
    assert away.weight_bytes < 20 * 10**9
    assert away.read_bytes == here.read_bytes
