"""One Ray for all tests that need not start or end one: with 2 CPUs, whatever the machine has."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from k2dist.cluster.ray_host import HostProcess, start_host
from k2dist.config.cluster import RayConfig

sys.path.insert(0, str(Path(__file__).parent))  # for command.py


@pytest.fixture(scope="session")
def ray_host() -> Iterator[HostProcess]:
    before = os.environ.pop("RAY_ADDRESS", None)
    host = start_host(RayConfig(num_cpus=2), is_detached=False, deadline_s=120)
    try:
        yield host.process
    finally:
        host.stop(20)
        if before is not None:
            os.environ["RAY_ADDRESS"] = before
