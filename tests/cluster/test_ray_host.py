"""The process that holds a Ray of our own: found by what cannot be mistaken, and ended with its children."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from msgspec.structs import replace

from k2dist.cluster.process_mark import find_process, mark_process
from k2dist.cluster.ray_host import HostProcess, start_host, stop_host
from k2dist.config.cluster import RayConfig
from k2dist.errors import CapacityError, PeerError

# A host that ends on SIGTERM only in a while, and a child that never would by itself.
PARENT = """
import signal, subprocess, sys, time
stubborn = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", stubborn])
print(child.pid, flush=True)
time.sleep(600)
"""


@pytest.fixture
def parent() -> Iterator[tuple[HostProcess, psutil.Process]]:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        child = psutil.Process(int(process.stdout.readline()))
        yield HostProcess(address="", log_dir="", mark=mark_process(process.pid)), child
        process.kill()
    for left in (child,) if child.is_running() else ():
        left.kill()


def test_a_host_ends_with_its_children(parent: tuple[HostProcess, psutil.Process]) -> None:
    host, child = parent
    assert find_process(host.mark) is not None
    stop_host(host, deadline_s=0.5)
    psutil.wait_procs([child], timeout=5)
    assert find_process(host.mark) is None
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_a_process_that_took_the_pid_is_left_alone(parent: tuple[HostProcess, psutil.Process]) -> None:
    host, child = parent
    other = replace(host, mark=replace(host.mark, created_s=host.mark.created_s - 1))
    assert find_process(other.mark) is None
    stop_host(other, deadline_s=0.5)
    assert find_process(host.mark) is not None
    assert child.is_running()


def test_a_host_that_is_gone_is_gone() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        host = HostProcess(address="", log_dir="", mark=mark_process(process.pid))
        process.communicate(b"\n")
    assert find_process(host.mark) is None
    stop_host(host, deadline_s=0.1)


def test_a_ray_that_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(CapacityError, match="Ray did not start: it gave no reason"):
        start_host(RayConfig(), is_detached=False, deadline_s=10)


def test_a_ray_that_is_too_slow_is_given_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    slow = tmp_path / "slow"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(slow))
    with pytest.raises(PeerError, match=r"deadlines\.start_s=0\.3"):
        start_host(RayConfig(), is_detached=True, deadline_s=0.3)
