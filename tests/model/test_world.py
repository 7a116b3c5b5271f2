"""Any layout: at equal tp the same bits, in float32 the same tokens as one rank."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest
import torch
from k2kernels.native import NoNativeKernelsError, load
from torch import Tensor

from k2dist.config import Architecture
from k2dist.parallel import Layout, first_layout

if TYPE_CHECKING:
    from tests.model.conftest import Rig, Tokens

SHAPES = ((33, 21), (1, 1), (58, 40), (20, 3))  # tokens, of them prompt


def available() -> list[str]:
    """Kernel sets that this machine can run."""
    try:
        load()
    except NoNativeKernelsError:
        return ["float32", "bfloat16"]
    return ["float32", "bfloat16", "native"]


def layouts(architecture: Architecture) -> list[Layout]:
    shapes = [
        {"lanes": 2, "tp": 1},
        {"lanes": 4, "tp": 1},
        {"lanes": 1, "tp": 1, "expert_only_ranks": 3},
        {"lanes": 3, "tp": 1, "expert_only_ranks": 1},
        {"lanes": 2, "tp": 1, "slots_per_rank": 9},
        {"lanes": 1, "tp": 2},
        {"lanes": 2, "tp": 2},
        {"lanes": 1, "tp": 2, "expert_only_ranks": 1},
        {"lanes": 1, "tp": 4},
    ]
    return [first_layout(architecture, **shape) for shape in shapes]  # type: ignore[arg-type]


def sequences(rig: Rig, architecture: Architecture) -> list[Tokens]:
    rng = random.Random(7)
    return [
        rig.sequence(architecture, num_tokens, prompt_len, 10 * i, rng)
        for i, (num_tokens, prompt_len) in enumerate(SHAPES)
    ]


def run(
    rig: Rig, layout: Layout, kernels: str, shuffle: random.Random | None, lane_of: list[int]
) -> list[Tensor]:
    """Every sequence's logits: prompts in one step, then the generated rows; each on its lane."""
    architecture = rig.architecture()
    world = rig.world(architecture, rig.published(architecture), layout, kernels=rig.kernels(kernels))
    parts: list[list[Tensor]] = [[] for _ in SHAPES]
    everyone = sequences(rig, architecture)
    for is_prompt in (True, False):
        grants: dict[int, dict[int, object]] = {}
        for i, sequence in enumerate(everyone):
            start, stop = (
                (0, sequence.prompt_len) if is_prompt else (sequence.prompt_len, len(sequence.tokens))
            )
            if stop > start:
                grants.setdefault(lane_of[i] % layout.num_lanes, {})[i] = rig.grant(sequence, start, stop)
        batches = {
            lane: rig.batch(list(theirs.values()), layout.tp, shuffle) for lane, theirs in grants.items()
        }
        logits = world.step(batches)
        for lane, theirs in grants.items():
            counts = [grant.stop - grant.start for grant in theirs.values()]  # type: ignore[attr-defined]
            for i, rows in zip(theirs, logits[lane].split(counts), strict=True):
                parts[i].append(rows)
    return [torch.cat(rows) for rows in parts]


@pytest.fixture(scope="module")
def expected(rig: Rig) -> dict[tuple[int, str], list[Tensor]]:
    """One lane, rows in order: by tp and kernels."""
    architecture = rig.architecture()
    return {
        (tp, kernels): run(rig, first_layout(architecture, lanes=1, tp=tp), kernels, None, [0] * len(SHAPES))
        for tp in (1, 2, 4)
        for kernels in available()
    }


@pytest.mark.parametrize("kernels", ["float32", "bfloat16", "native"])
@pytest.mark.parametrize("number", range(9))
def test_a_layout_changes_no_bit_at_equal_tp(
    rig: Rig,
    expected: dict[tuple[int, str], list[Tensor]],
    number: int,
    kernels: str,
    seed: int,
) -> None:
    """Rows shuffled, shares uneven (a tp rank may have none), a lane idle while another works."""
    if kernels not in available():
        pytest.skip("no native kernels were built")
    layout = layouts(rig.architecture())[number]
    for lane_of in ([0, 1, 2, 3], [0, 0, 0, 0], [1, 1, 1, 0]):
        logits = run(rig, layout, kernels, random.Random(seed), lane_of)
        for i, (rows, wanted) in enumerate(zip(logits, expected[layout.tp, kernels], strict=True)):
            assert torch.equal(rows, wanted), f"sequence {i}, lanes {lane_of}"


@pytest.mark.parametrize("tp", [2, 4])
def test_tp_gives_the_tokens_of_one_rank_in_float32(
    rig: Rig, expected: dict[tuple[int, str], list[Tensor]], tp: int
) -> None:
    for rows, wanted in zip(expected[tp, "float32"], expected[1, "float32"], strict=True):
        assert torch.equal(rows.argmax(-1), wanted.argmax(-1))
        assert (rows - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_a_world_with_no_row_at_all_steps(rig: Rig) -> None:
    architecture = rig.architecture()
    layout = first_layout(architecture, lanes=1, tp=2, expert_only_ranks=1)
    world = rig.world(architecture, rig.published(architecture), layout)
    assert world.step({})[0].shape == (0, architecture.vocab_size)
