"""`k2dist` as a user runs it: a process of its own, watched with all that comes of it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Self

import psutil

from k2dist.config.cluster import ClusterConfig
from k2dist.config.load import parse_cluster

GONE_S = 15.0  # Ray's processes have ended this long after their starter; the machine may be busy
UP_S = 120.0


class Command:
    """One run of the command line; a context that leaves no process behind."""

    def __init__(self, *arguments: str | Path, ray_address: str | None = None, **settings: str) -> None:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | settings
        if ray_address is not None:
            environment |= {"RAY_ADDRESS": ray_address, "RAY_AUTH_MODE": "token"}
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by __exit__
        self.process = subprocess.Popen(
            [sys.executable, "-m", "k2dist", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
            start_new_session=True,  # so that a signal to its group is what Ctrl-C is
        )
        self._tree: set[psutil.Process] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.note_tree()
        self.process.kill()
        self.process.wait()
        for left in self.living():
            left.kill()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self._errors.close()

    def note_tree(self) -> set[psutil.Process]:
        """Remember the processes that have come of it by now."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self._tree |= set(psutil.Process(self.process.pid).children(recursive=True))
        return self._tree

    def living(self) -> list[psutil.Process]:
        """Of all processes that were ever noted, those that live."""
        return [process for process in self._tree if is_living(process)]

    def line(self) -> dict[str, Any]:
        """The next line of its output, as JSON; fails with its stderr if there is none."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"no output; stderr: {self.errors()}"
        answer: dict[str, Any] = json.loads(line)
        self.note_tree()
        return answer

    def wait(self, timeout_s: float = UP_S) -> int:
        """Its exit code; notes its tree meanwhile."""
        give_up_s = time.monotonic() + timeout_s
        while self.process.poll() is None:
            assert time.monotonic() < give_up_s, f"still running; stderr: {self.errors()}"
            self.note_tree()
            time.sleep(0.2)
        return self.process.returncode

    def output(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.read().decode()

    def errors(self) -> str:
        self._errors.seek(0)
        return self._errors.read().decode()

    def error_line(self) -> str:
        """Its one line of error."""
        lines = [line for line in self.errors().splitlines() if line.startswith("k2dist: error: ")]
        assert len(lines) == 1, self.errors()
        return lines[0]


def is_living(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def await_that(condition: Any, what: str, timeout_s: float = GONE_S) -> None:
    give_up_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < give_up_s, what
        time.sleep(0.1)


def actors_of(host_pid: int, kind: str = "") -> list[psutil.Process]:
    """Living Ray actors below a host, named like `kind`."""
    found = []
    for process in psutil.Process(host_pid).children(recursive=True):
        try:
            if process.name().startswith(f"ray::{kind}") and is_living(process):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def write_config(directory: Path, name: str, **sections: str) -> Path:
    """A small cluster: one rank, short deadlines, any port; `sections` replace or add."""
    given = {
        "parallel": "{lanes: 1, tp: 1}",
        "cache": "{page_tokens: 16, num_pages: 64}",
        "scheduler": "{step_tokens: 64, chunk_tokens: 32, max_running: 8, max_waiting: 32}",
        "ranks": "{rank_cpus: 1}",
        "deadlines": "{start_s: 90, call_s: 30, drain_s: 5, stop_s: 5}",
        "service": "{grpc: '127.0.0.1:0', http: null, retain_s: 5}",
    } | sections
    path = directory / f"{name}.yaml"
    path.write_text(f"name: {name}\n" + "".join(f"{key}: {value}\n" for key, value in given.items()))
    config: ClusterConfig = parse_cluster(path.read_text(), str(path))
    assert config.name == name
    return path
