"""`ray job submit` on a Ray that is there, from a wheel: it says how it goes, why it fails, and leaves nothing."""

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
    shutil.copy(build_wheel(made), directory)
    config = yaml.safe_load((directory / "cluster.yaml").read_text())
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
    assert "k2dist: error: the layout needs 4 ranks x 3 CPU = 12 CPU, and Ray has 2;" in said
    assert ray.living_actors("Supervisor") == []


def test_a_job_serves_from_a_wheel_and_stop_leaves_nothing(
    ray: DashboardRay, wheel_options: tuple[str | Path, ...]
) -> None:
    submitted = ray.job(
        "submit", "--no-wait", "--submission-id", "one", *wheel_options, *SERVE, "cluster.yaml"
    )
    assert submitted.returncode == 0, submitted.stderr
    line = await_line(lambda: ray.job_log("one"), "job serves ", 60)
    log = ray.job_log("one")
    for stage in ("joining the Ray at", "placing the ranks", "rank 3 has loaded and tested"):
        assert stage in log
    assert f"{ROOT}/" not in log, "it ran from the checkout"
    (http,) = re.findall(r"http://\S+", line)
    with urllib.request.urlopen(f"{http}/health", timeout=10) as health:
        assert health.status == 200
    assert len(ray.living_actors("RankActor")) == 4
    assert len(ray.placement_groups()) == 1
    assert ray.job("stop", "one").returncode == 0
    await_that(lambda: ray.living_actors() == [], "an actor lives on", 30)
    await_that(lambda: ray.placement_groups() == [], "a placement group lives on")
    assert ray.job_info("one")["status"] == "STOPPED"


def test_what_a_dead_supervisor_left_is_cleared_by_the_next(
    ray: DashboardRay, wheel_options: tuple[str | Path, ...]
) -> None:
    """Its driver dies with it, as with a machine: its ranks hold every CPU, and nobody is left to end them."""
    first = ray.job("submit", "--no-wait", "--submission-id", "two", *wheel_options, *SERVE, "cluster.yaml")
    assert first.returncode == 0, first.stderr
    await_line(lambda: ray.job_log("two"), "job serves ", 60)
    ranks = {actor["pid"] for actor in ray.living_actors("RankActor")}
    (supervisor,) = ray.living_actors("Supervisor")
    os.kill(
        ray.job_info("two")["driver_info"]["pid"] and int(ray.job_info("two")["driver_info"]["pid"]),
        signal.SIGKILL,
    )
    os.kill(supervisor["pid"], signal.SIGKILL)
    await_that(lambda: ray.living_actors("Supervisor") == [], "the supervisor lives on")
    assert {actor["pid"] for actor in ray.living_actors("RankActor")} == ranks
    again = ray.job("submit", "--no-wait", "--submission-id", "three", *wheel_options, *SERVE, "cluster.yaml")
    assert again.returncode == 0, again.stderr
    await_line(lambda: ray.job_log("three"), "job serves ", 60)
    assert len(ray.living_actors("RankActor")) == 4
    assert not ranks & {actor["pid"] for actor in ray.living_actors("RankActor")}
    assert ray.job("stop", "three").returncode == 0
    await_that(lambda: ray.living_actors() == [], "an actor lives on", 30)
