"""Two hosts, each a network namespace with a Ray node: what leaves one reaches the other, or fails.

Needs root, which CI machines may not give; then it is skipped, and says why.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import psutil
import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "deploy" / "two_hosts.py"
ACTORS = tuple(f"ray::{kind}" for kind in ("Supervisor", "Rank", "Coordinator", "Gateway", "Prober"))
LOST_S = 45.0  # from the loss of a host to the end of the cluster: Ray's health check, and the ranks' end


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("two_hosts", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


two_hosts = load_script()


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[object, object, str]]:
    reason = two_hosts.why_not()
    if reason:
        pytest.skip(f"two hosts: {reason}")
    with two_hosts.two_hosts() as (first, second), two_hosts.ray_on(first, second) as address:
        yield first, second, address
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert first.namespace not in listed
    assert second.namespace not in listed


def doctor(first, address: str) -> tuple[int, dict]:
    looking = first.start("k2dist", "doctor", str(two_hosts.CONFIG), "--json", RAY_ADDRESS=address)
    output, _ = looking.communicate(timeout=90)
    return looking.returncode, json.loads(output)


def test_a_cluster_over_two_hosts_is_looked_at_answers_and_ends_when_one_is_lost(hosts) -> None:
    """One story, since each beginning takes a minute of two cores."""
    first, second, address = hosts
    code, report = doctor(first, address)
    assert code == 0, [each for each in report["findings"] if each["level"] == "error"]
    assert {node["node"] for node in report["facts"]["nodes"]} == {first.address, second.address}
    (link,) = report["facts"]["links"]
    assert sorted(link["nodes"]) == [first.address, second.address]
    assert link["bytes_per_s"] > 0
    assert all(abs(node["clock"]["offset_s"]) < 0.5 for node in report["facts"]["nodes"])

    with two_hosts.served(first, address) as serving:
        answer = json.loads(serving.stdout.readline())
        assert "error" not in answer, answer
        homes = {rank["world_rank"]: rank["node"] for rank in answer["ranks"]}
        assert homes[0] == homes[1] != homes[2] == homes[3]
        assert two_hosts.ask(first, two_hosts.QUESTION) == "The capital of Italy is Rome."

        second.lose()
        lost_s = time.monotonic()
        assert serving.wait(LOST_S) == 1
        error = json.loads(serving.stdout.readline())["error"]
        took_s = time.monotonic() - lost_s
    gone = [str(rank) for rank, node in homes.items() if node == second.address]
    assert error["kind"] == "UnavailableError"
    assert any(f"world rank {rank} " in error["message"] for rank in gone), error["message"]
    assert took_s < LOST_S
    left = [psutil.Process(pid).name() for pid in first.pids()]
    assert not [name for name in left if name.startswith(ACTORS)], left
    assert second.pids() == []
