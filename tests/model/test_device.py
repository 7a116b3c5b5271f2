"""Everything a forward pass makes is on the device of its weights, with no word from the default device."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from k2dist.comm import Exchange
from k2dist.model.batch import Batch

if TYPE_CHECKING:
    from tests.model.conftest import Rig


class OnCpu:
    """An exchange whose own tensors are made on the CPU, whatever the default."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    def dispatch(self, moe_layer: int, rows_TW: Tensor, expert_TK: Tensor) -> object:
        with torch.device("cpu"):
            return self._exchange.dispatch(moe_layer, rows_TW, expert_TK)

    def combine(self, out_MD: Tensor, ticket: object) -> Tensor:
        with torch.device("cpu"):
            return self._exchange.combine(out_MD, ticket)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_step_makes_nothing_on_the_default_device(rig: Rig, dtype: torch.dtype, seed: int) -> None:
    """The default is `meta`, whose tensors have no numbers and meet no others: one is an error."""
    architecture = rig.architecture()
    published = rig.published(architecture)
    world = rig.world(architecture, published, dtype=dtype)
    sequence = rig.sequence(architecture, 70, 60, 0, random.Random(seed))
    prompt, generated = (rig.batch([rig.grant(sequence, a, b)], 1) for a, b in ((0, 60), (60, 70)))
    wanted = [rig.world(architecture, published, dtype=dtype).ranks[0]]
    wanted_logits = [wanted[0].step({0: batch}) for batch in (prompt, generated)]
    (rank,) = world.ranks
    rank.exchange = OnCpu(rank.exchange)  # type: ignore[assignment]
    idle = Batch.empty(1)
    with torch.device("meta"):
        logits = [rank.step({0: batch}) for batch in (prompt, generated)]
        nothing = rank.step({0: idle})
    assert all(torch.equal(a, b) for a, b in zip(logits, wanted_logits, strict=True))
    assert nothing.shape == (0, architecture.vocab_size)
    assert nothing.device == idle.device
