"""The small architecture of tests/conftest.py: ragged kv_a, 12 experts, legal at tp 1, 2 and 4."""

from pathlib import Path

import pytest

from k2dist.config import Architecture, read_architecture


@pytest.fixture(scope="session")
def small(tiny_model_dir: Path) -> Architecture:
    return read_architecture(tiny_model_dir)
