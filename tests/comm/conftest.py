"""Ranks as threads, for every test of `comm`."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from k2dist.comm import Communicator

Results = list[object]


def _run_ranks(comms: Sequence[Communicator], rank_main: Callable[[Communicator], object]) -> Results:
    """`rank_main` on one thread per communicator; results in rank order, the first error raised."""
    with ThreadPoolExecutor(len(comms)) as pool:
        futures = [pool.submit(rank_main, comm) for comm in comms]
    return [future.result() for future in futures]


@pytest.fixture(scope="session")
def run_ranks() -> Callable[[Sequence[Communicator], Callable[[Communicator], object]], Results]:
    return _run_ranks
