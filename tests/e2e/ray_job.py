"""A Ray with a dashboard, in an environment that has all of k2dist's dependencies and not k2dist itself."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any, Self

import psutil

from tests.e2e.command import await_that, is_living

ROOT = Path(__file__).resolve().parents[2]
UP_S = 60.0


def build_wheel(directory: Path) -> Path:
    """k2dist's, without the native library, which takes a compiler half a minute. Of a copy of the sources:
    nothing is built into the checkout."""
    sources = directory / "sources"
    for name in ("LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py"):
        sources.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, sources)
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    for name in ("k2dist", "kernels"):
        shutil.copytree(ROOT / name, sources / name, ignore=ignored)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps"]
    settings = {**os.environ, "PATH": "", "CXX": ""}
    subprocess.run([*command, "--wheel-dir", directory, sources], check=True, env=settings)
    (wheel,) = directory.glob("k2dist-*.whl")
    return wheel


def make_environment(directory: Path) -> Path:
    """The Python of an environment that sees our packages, but not those installed as editable."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", directory], check=True)
    python = directory / "bin" / "python"
    (site,) = directory.glob("lib/python3.*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


class DashboardRay:
    """`ray start --head` with a dashboard; a context, which leaves no process behind."""

    def __init__(self, python: Path, num_cpus: int) -> None:
        self._python = python
        self._directory = tempfile.mkdtemp(prefix="k2")  # short: Ray's sockets are in it
        self._token = secrets.token_hex(16)
        self.port, dashboard, *others = _free_ports(4)
        self.url = f"http://127.0.0.1:{dashboard}"
        options = {
            "port": self.port,
            "dashboard-port": dashboard,
            "dashboard-agent-listen-port": others[0],
            "metrics-export-port": others[1],
            "num-cpus": num_cpus,
            "object-store-memory": 80 * 2**20,
            "temp-dir": self._directory,
        }
        flags = [f"--{name}={value}" for name, value in options.items()]
        self._log = open(f"{self._directory}.log", "wb")  # noqa: SIM115 - closed by __exit__
        self._process = subprocess.Popen(
            [python, "-m", "ray.scripts.scripts", "start", "--head", "--block", *flags],
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=self._settings(),
            start_new_session=True,
        )

    def __enter__(self) -> Self:
        return self

    def await_dashboard(self) -> None:
        await_that(self._answers, f"no dashboard; see {self._directory}.log", UP_S)

    def __exit__(self, *_: object) -> None:
        """Jobs have ended in order; Ray itself, which takes its time, need not."""
        host = psutil.Process(self._process.pid)
        tree = [host, *host.children(recursive=True)]
        for process in filter(is_living, tree):
            process.kill()
        psutil.wait_procs(tree, timeout=10)
        self._process.wait(10)
        self._log.close()
        shutil.rmtree(self._directory, ignore_errors=True)
        Path(f"{self._directory}.log").unlink()

    def job(self, *arguments: str | Path) -> subprocess.Popen[str]:
        """`ray job ...`, as a user runs it, and what it says."""
        return subprocess.Popen(
            [self._python, "-m", "ray.scripts.scripts", "job", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=self._settings(),
        )

    def job_info(self, submission_id: str) -> dict[str, Any]:
        found: dict[str, Any] = self._get(f"/api/jobs/{submission_id}")
        return found

    def job_log(self, submission_id: str) -> str:
        text: str = self._get(f"/api/jobs/{submission_id}/logs")["logs"]
        return text

    def living_actors(self, kind: str = "") -> list[dict[str, Any]]:
        """Of k2dist: those that are not dead, of class `kind`."""
        return [
            actor
            for actor in self._listed("/api/v0/actors")
            if actor["state"] != "DEAD" and actor["name"] and actor["class_name"].startswith(kind)
        ]

    def placement_groups(self) -> list[dict[str, Any]]:
        """Those that still hold, or ask for, anything."""
        groups = self._listed("/api/v0/placement_groups")
        return [group for group in groups if group["state"] != "REMOVED"]

    def _listed(self, path: str) -> list[dict[str, Any]]:
        answer = self._get(f"{path}?detail=true")
        rows: list[dict[str, Any]] = answer["data"]["result"]["result"]
        return rows

    def _get(self, path: str) -> Any:
        request = urllib.request.Request(self.url + path, headers={"Authorization": f"Bearer {self._token}"})
        with urllib.request.urlopen(request, timeout=10) as reply:
            return json.loads(reply.read())

    def _answers(self) -> bool:
        with contextlib.suppress(OSError):
            self._get("/api/jobs/")
            return True
        return False

    def _settings(self) -> dict[str, str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "PYTHON"))}
        ours = {
            "RAY_API_SERVER_ADDRESS": self.url,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self._token,
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        return kept | ours


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [server.getsockname()[1] for server in sockets]


def await_line(read: Any, text: str, timeout_s: float) -> str:
    """The first line of what `read` returns that holds `text`."""
    give_up_s = time.monotonic() + timeout_s
    while True:
        said = read()
        for line in said.splitlines():
            if text in line:
                return str(line)
        assert time.monotonic() < give_up_s, f"no {text!r} in:\n{said}"
        time.sleep(0.3)
