"""K2 by name, and the small architecture of tests/conftest.py (legal at tp 1, 2 and 4)."""

from pathlib import Path

import pytest

from k2dist.config import Architecture, find_architecture, read_architecture


@pytest.fixture(scope="session")
def k2() -> Architecture:
    return find_architecture("kimi-k2-instruct")


@pytest.fixture(scope="session")
def small(tiny_model_dir: Path) -> Architecture:
    return read_architecture(tiny_model_dir)
