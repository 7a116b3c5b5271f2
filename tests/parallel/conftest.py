"""The small architecture of tests/conftest.py (legal at tp 1, 2 and 4), and the real one."""

from pathlib import Path

import pytest

from k2dist.config import Architecture, read_architecture


@pytest.fixture(scope="session")
def small(tiny_model_dir: Path) -> Architecture:
    return read_architecture(tiny_model_dir)


@pytest.fixture(scope="session")
def k2() -> Architecture:
    return read_architecture(Path(__file__).parents[1] / "config" / "data" / "kimi-k2-instruct")
