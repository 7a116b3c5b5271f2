"""Small rehearsals of the tiny model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from k2kernels import KernelSet

from k2dist.config import Architecture, read_architecture
from k2dist.parallel import Layout
from k2dist.rehearsal.load import Load
from k2dist.rehearsal.rank import RehearsedRank

PAGE_TOKENS = 16
CPU = torch.device("cpu")

MakeRank = Callable[[Layout, int, Load], RehearsedRank]


@pytest.fixture(scope="session")
def tiny(tiny_model_dir: Path) -> Architecture:
    return read_architecture(tiny_model_dir)


@pytest.fixture
def make_rank(tiny: Architecture) -> MakeRank:
    def make(layout: Layout, world_rank: int, load: Load) -> RehearsedRank:
        kernels = KernelSet.reference()
        return RehearsedRank(tiny, layout, world_rank, kernels, load, page_tokens=PAGE_TOKENS, device=CPU)

    return make
