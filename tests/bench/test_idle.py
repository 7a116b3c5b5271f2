"""CPU time is counted of a process and of all that came of it."""

import os
import signal
import subprocess
import sys

import pytest

from k2dist.bench.idle import cpu_percents, idle_cost

BUSY = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'while True: pass'])"


def test_a_busy_grandchild_counts_and_a_sleeper_does_not() -> None:
    asleep = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    busy = subprocess.Popen([sys.executable, "-c", BUSY], start_new_session=True)
    notes: list[None] = []
    try:
        cpu_percents(busy.pid, 1, 1.0, lambda: None)  # until it is up
        (spent,) = cpu_percents(busy.pid, 1, 1.0, lambda: notes.append(None))
        (idle,) = cpu_percents(asleep.pid, 1, 0.5, lambda: None)
    finally:
        os.killpg(busy.pid, signal.SIGKILL)
        for process in (asleep, busy):
            process.kill()
            process.wait()
    assert len(notes) == 1
    assert idle < 5 < spent


def test_medians_are_compared() -> None:
    found = idle_cost(6, 5.0, cluster=[4.0, 30.0, 5.0], actors=[3.0, 2.5, 50.0])
    assert (found.cluster_percent, found.actors_percent, found.num_windows) == (5.0, 3.0, 3)
    assert found.more_percent == pytest.approx(2.0)
