"""Steps in frames of a fixed capacity give the bits of exact ones, also where the frames were too small."""

from __future__ import annotations

from pathlib import Path

import pytest

from k2dist.comm import StepAgreement
from k2dist.config import read_architecture
from k2dist.engine import LocalWorld
from k2dist.engine.form import Form, FormRule
from k2dist.engine.local import Generated
from k2dist.messages import RankStats, Sampling
from k2dist.parallel import first_layout
from k2dist.scheduler import Limits

LIMITS = Limits(step_tokens=48, max_running=16, max_waiting=64, chunk_tokens=24)
DRAWN = Sampling(temperature=1.0, seed=5, max_tokens=6, ignore_eos=True, frequency_penalty=0.5, logprobs=2)
TOO_SMALL = 0.01  # leaves the margin for chance: 11 pairs in a frame
LAYOUTS = [(1, 1, 0), (2, 2, 0), (1, 2, 1), (3, 1, 1)]
SLOW_LAYOUTS = [(2, 1, 0), (4, 1, 0), (1, 2, 0), (1, 4, 0), (1, 1, 3)]  # each a part of those


def run(
    model_dir: Path,
    shape: tuple[int, int, int],
    capacity_factor: float | None,
    *,
    num_prompts: int,
    dtype: str = "float32",
    num_lanes: int | None = None,
) -> tuple[list[Generated], list[RankStats]]:
    """`shape`: lanes, tp, ranks with experts alone. Prompts go to the first `num_lanes` lanes."""
    lanes, tp, expert_only_ranks = shape
    layout = first_layout(
        read_architecture(model_dir), lanes=lanes, tp=tp, expert_only_ranks=expert_only_ranks
    )
    prompts = [[(7 * i + 13 * j * j + 5) % 256 for j in range(1 + 5 * (i % 4))] for i in range(num_prompts)]
    with LocalWorld(
        model_dir,
        layout,
        limits=LIMITS,
        page_tokens=16,
        num_pages=64,
        dtype=dtype,
        capacity_factor=capacity_factor,
        step_deadline_s=60,
    ) as world:
        outputs = world.generate(prompts, DRAWN, lane_of=lambda i: i % (num_lanes or lanes))
    return outputs, [rank.stats() for rank in world.ranks]  # all have left after the same step


def counted(stats: list[RankStats]) -> tuple[int, int]:
    """(steps padded, overflows), the same on all ranks."""
    ((num_steps_padded, num_overflows),) = {(rank.num_steps_padded, rank.num_overflows) for rank in stats}
    return num_steps_padded, num_overflows


@pytest.mark.parametrize(
    "shape", [*LAYOUTS, *(pytest.param(shape, marks=pytest.mark.slow) for shape in SLOW_LAYOUTS)]
)
def test_padded_steps_give_the_bits_of_exact_ones_in_any_layout(
    tiny_model_dir: Path, shape: tuple[int, int, int]
) -> None:
    exact, stats = run(tiny_model_dir, shape, None, num_prompts=5)
    assert counted(stats) == (0, 0)
    padded, stats = run(tiny_model_dir, shape, 1.0, num_prompts=5)
    num_steps_padded, num_overflows = counted(stats)
    assert padded == exact
    assert num_steps_padded >= DRAWN.max_tokens - 2, "all but those with prompts"
    assert num_overflows == 0


@pytest.mark.parametrize(
    ("shape", "num_lanes", "dtype"),
    [
        ((2, 2, 0), 2, "float32"),
        ((4, 1, 0), 1, "float32"),
        ((1, 2, 2), 1, "bfloat16"),
        ((4, 1, 0), 4, "bfloat16"),
    ],
    ids=["lanes", "idle lanes", "ranks with experts alone", "as it is served"],
)
def test_a_step_that_did_not_fit_is_repeated_exactly(
    skewed_model_dir: Path, shape: tuple[int, int, int], num_lanes: int, dtype: str
) -> None:
    """All rows go to rank 0's experts, and frames have room for hardly more than chance brings."""
    exact, stats = run(skewed_model_dir, shape, None, num_prompts=16, dtype=dtype, num_lanes=num_lanes)
    load = stats[0].expert_load
    padded, stats = run(skewed_model_dir, shape, TOO_SMALL, num_prompts=16, dtype=dtype, num_lanes=num_lanes)
    num_steps_padded, num_overflows = counted(stats)
    assert padded == exact
    assert 0 < num_overflows <= num_steps_padded
    assert sum(map(sum, load)) > 0
    assert all(sum(map(sum, rank.expert_load)) == 0 for rank in stats[1:]), "the router is skewed"


def test_an_even_capacity_overflows_where_the_router_is_skewed(skewed_model_dir: Path) -> None:
    """Twelve rows of a rank want 36 outputs of one rank; room for an even load and its chance is 33."""
    exact, _ = run(skewed_model_dir, (4, 1, 0), None, num_prompts=12, num_lanes=1)
    padded, stats = run(skewed_model_dir, (4, 1, 0), 1.0, num_prompts=12, num_lanes=1)
    assert padded == exact
    assert counted(stats)[1] > 0


def test_steps_with_prompts_exchange_exactly(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On all ranks, whichever lane has the prompts."""
    seen: set[tuple[bool, bool]] = set()
    form = FormRule.form

    def note(rule: FormRule, agreed: StepAgreement) -> Form:
        found = form(rule, agreed)
        seen.add((agreed.has_prompts, found.capacity is not None))
        return found

    monkeypatch.setattr(FormRule, "form", note)
    run(tiny_model_dir, (2, 1, 0), 1.0, num_prompts=6)
    assert seen == {(True, False), (False, True)}
