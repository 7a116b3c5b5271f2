"""A model in this process with two lanes that are soon full."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from k2dist.llm import LLM
from k2dist.llm.ask import Prepare
from k2dist.scheduler import Limits

LIMITS = Limits(step_tokens=48, chunk_tokens=24, max_running=4, max_waiting=6)
PAGE_TOKENS, NUM_PAGES = 16, 32


def open_llm(model_dir: Path, *, lanes: int = 2, tp: int = 1, seed: int | None = None) -> LLM:
    return LLM(
        model_dir,
        lanes=lanes,
        tp=tp,
        limits=LIMITS,
        page_tokens=PAGE_TOKENS,
        num_pages=NUM_PAGES,
        dtype="float32",
        seed=seed,
    )


@pytest.fixture(scope="package")
def llm(tiny_model_dir: Path) -> Iterator[LLM]:
    with open_llm(tiny_model_dir) as llm:
        yield llm


@pytest.fixture(scope="package")
def prepare(tiny_model_dir: Path) -> Prepare:
    """For lanes whose pages are no bound."""
    return Prepare(tiny_model_dir, page_tokens=64, num_pages=2**20, draw_seed=lambda: 7)
