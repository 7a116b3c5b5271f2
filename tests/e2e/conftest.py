"""One Ray for all tests that need not start or end one: with 2 CPUs, whatever the machine has."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from k2dist.cluster.ray_host import HostProcess, start_host
from k2dist.config.cluster import RayConfig


@pytest.fixture(scope="session", autouse=True)
def ctrl_c() -> None:
    """A shell's background jobs ignore SIGINT, and so would every command that they start."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def ray_host() -> Iterator[HostProcess]:
    host = start_host(RayConfig(num_cpus=2), is_detached=False, deadline_s=120)
    try:
        yield host.process
    finally:
        host.stop(20)
