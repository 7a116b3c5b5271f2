"""`ray job submit` on a Ray that is there, from a wheel: it says how it goes or why not, leaves nothing."""

from __future__ import annotations

import os
import re
import shutil
import signal
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.e2e.command import await_that
from tests.e2e.ray_job import ROOT, DashboardRay, await_line, build_wheel, make_environment

SERVE = ("--", "python", "-m", "k2dist", "serve", "--config")


@pytest.fixture(scope="module")
def working_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """deploy/job, with a wheel and configurations of small clusters in it."""
    made = tmp_path_factory.mktemp("wheel")
    directory = made / "job"
    shutil.copytree(ROOT / "deploy/job", directory, ignore=shutil.ignore_patterns("*.whl"))
    wheel = build_wheel(made)
    shutil.copy(wheel, directory)
    settings = directory / "runtime_env.yaml"
    settings.write_text(re.sub(r"k2dist-.*\.whl", wheel.name, settings.read_text()))  # of this Python
    config = yaml.safe_load((directory / "cluster.yaml").read_text())
    config["parallel"], config["ranks"] = {"lanes": 1, "tp": 1}, {"rank_cpus": 2}
    config["service"] = {"grpc": "127.0.0.1:0", "http": "127.0.0.1:0"}
    config["deadlines"] = {"start_s": 90, "drain_s": 5, "stop_s": 5}
    (directory / "cluster.yaml").write_text(yaml.safe_dump(config))
    (directory / "large.yaml").write_text(yaml.safe_dump(config | {"ranks": {"rank_cpus": 3}}))
    return directory


@pytest.fixture(scope="module")
def ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DashboardRay]:
    python = make_environment(tmp_path_factory.mktemp("environment") / "venv")
    with DashboardRay(python, num_cpus=2) as running:
        yield running


@pytest.fixture(scope="module")
def wheel_options(working_dir: Path) -> tuple[str | Path, ...]:
    return ("--working-dir", working_dir, "--runtime-env", working_dir / "runtime_env.yaml")


def test_a_job_that_cannot_be_fails_with_the_reason(
    ray: DashboardRay, wheel_options: tuple[str | Path, ...]
) -> None:
    done = ray.job("submit", *wheel_options, *SERVE, "large.yaml", timeout_s=90)
    assert done.returncode != 0
    said = done.stdout + done.stderr
    assert "k2dist: error: the layout needs 1 ranks x 3 CPU = 3 CPU, and Ray has 2;" in said
    assert ray.living_actors("Supervisor") == []


def test_a_job_serves_and_stop_leaves_nothing(
    ray: DashboardRay, wheel_options: tuple[str | Path, ...]
) -> None:
    """Also after an earlier driver and its supervisor died together, as with their machine: a rank then holds
    every CPU, and nobody is left to end it but the next cluster of that name."""
    orphan = _leave_an_orphan(ray, wheel_options)
    _submit(ray, "two", wheel_options)
    line = await_line(lambda: ray.job_log("two"), "job serves ", 60)
    log = ray.job_log("two")
    for stage in ("joining the Ray at", "ranks start, load their shards", "rank 0 has loaded and tested"):
        assert stage in log
    assert f"{ROOT}/" not in log, "it ran from the checkout"
    (http,) = re.findall(r"http://\S+", line)
    with urllib.request.urlopen(f"{http}/health", timeout=10) as health:
        assert health.status == 200
    (rank,) = ray.living_actors("RankActor")
    assert rank["pid"] != orphan
    assert len(ray.placement_groups()) == 1

    assert ray.job("stop", "two").returncode == 0
    await_that(lambda: ray.living_actors() == [], "an actor lives on", 30)
    await_that(lambda: ray.placement_groups() == [], "a placement group lives on")
    assert ray.job_info("two")["status"] == "STOPPED"


def _leave_an_orphan(ray: DashboardRay, wheel_options: tuple[str | Path, ...]) -> int:
    """A rank without driver and supervisor; its pid."""
    _submit(ray, "one", wheel_options)
    await_that(lambda: [one["state"] for one in ray.living_actors("RankActor")] == ["ALIVE"], "no rank", 60)
    (supervisor,) = ray.living_actors("Supervisor")
    for pid in (int(ray.job_info("one")["driver_info"]["pid"]), supervisor["pid"]):
        os.kill(pid, signal.SIGKILL)
    await_that(lambda: ray.living_actors("Supervisor") == [], "the supervisor lives on")
    (rank,) = ray.living_actors("RankActor")
    pid: int = rank["pid"]
    return pid


def _submit(ray: DashboardRay, submission_id: str, wheel_options: tuple[str | Path, ...]) -> None:
    options = ("--no-wait", "--submission-id", submission_id, *wheel_options)
    submitted = ray.job("submit", *options, *SERVE, "cluster.yaml")
    assert submitted.returncode == 0, submitted.stderr
