"""Two hosts, each a network namespace with a Ray node: what leaves one reaches the other, or fails.

Needs root, which CI machines may not give; then it is skipped, and says why.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.deploy.loading import load_script
from tests.e2e.two_hosts_peer import DEADLINE_S

SCRIPT = Path(__file__).resolve().parents[2] / "deploy" / "two_hosts.py"
PEER = "tests.e2e.two_hosts_peer"
ACTORS = tuple(f"ray::{kind}" for kind in ("Supervisor", "Rank", "Coordinator", "Gateway", "Prober"))
LOST_S = 45.0  # from the loss of a host to the end of the cluster: Ray's health check, and the ranks' end

two_hosts = load_script(SCRIPT)


@pytest.fixture
def hosts() -> Iterator[tuple[Any, Any]]:
    reason = two_hosts.why_not()
    if reason:
        pytest.skip(f"two hosts: {reason}")
    with two_hosts.two_hosts() as (first, second):
        yield first, second
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert first.namespace not in listed
    assert second.namespace not in listed


def said(peer: subprocess.Popen[str]) -> str:
    assert peer.stdout is not None
    return peer.stdout.readline().strip()


def test_what_is_sent_crosses_the_pair_and_the_loss_of_a_host_ends_the_wait(hosts: tuple[Any, Any]) -> None:
    """The communicators that ranks use, and no Ray: the whole of it takes minutes, and is the slow test."""
    first, second = hosts
    here, there = (
        first.start(PEER, "0", first.address),
        second.start(PEER, "1", second.address, first.address),
    )
    tell(there, said(here))
    assert (said(here), said(there)) == ("11", "10")
    second.lose()
    lost_s = time.monotonic()
    tell(here, "on")
    assert "late or dead: rank 1" in said(here)
    assert time.monotonic() - lost_s < 2 * DEADLINE_S
    assert second.pids() == []
    first.kill()
    for peer in (here, there):
        peer.communicate()


def tell(peer: subprocess.Popen[str], line: str) -> None:
    assert peer.stdin is not None
    peer.stdin.write(f"{line}\n")
    peer.stdin.flush()


def doctor(first: Any, address: str) -> tuple[int, dict[str, Any]]:
    looking = first.start("k2dist", "doctor", str(two_hosts.CONFIG), "--json", RAY_ADDRESS=address)
    output, _ = looking.communicate(timeout=90)
    return looking.returncode, json.loads(output)


@pytest.mark.slow  # a minute of two cores
def test_a_cluster_over_two_hosts_is_looked_at_answers_and_ends_when_one_is_lost(
    hosts: tuple[Any, Any],
) -> None:
    """One story, since each beginning takes long."""
    first, second = hosts
    with two_hosts.ray_on(first, second) as address:
        tell_story(first, second, address)


def tell_story(first: Any, second: Any, address: str) -> None:
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
