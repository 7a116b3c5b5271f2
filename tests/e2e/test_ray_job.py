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
def ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DashboardRay]:
    python = make_environment(tmp_path_factory.mktemp("environment") / "venv")
    with DashboardRay(python, num_cpus=2) as running:
        yield running


@pytest.fixture(scope="module")
def options(ray: DashboardRay, tmp_path_factory: pytest.TempPathFactory) -> tuple[str | Path, ...]:
    """Of `ray job submit`: deploy/job, with a wheel, which is built while Ray starts, and small clusters."""
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
    ray.await_dashboard()
    return ("--working-dir", directory, "--runtime-env", directory / "runtime_env.yaml")


def test_jobs_from_a_wheel_serve_or_fail_with_the_reason_and_stop_leaves_nothing(
    ray: DashboardRay, options: tuple[str | Path, ...]
) -> None:
    """Side by side: their environment is made once, and that, Ray's commands and imports take the time."""
    with ray.job("submit", *options, *SERVE, "absent.yaml") as cannot_be:
        _submit(ray, "one", options)
        line = await_line(lambda: ray.job_log("one"), "job serves ", 90)
        said, _ = cannot_be.communicate(timeout=60)
    assert cannot_be.returncode != 0
    assert "k2dist: error: absent.yaml: " in said

    log = ray.job_log("one")
    for stage in ("joining the Ray at", "ranks start, load their shards", "rank 0 has loaded and tested"):
        assert stage in log
    assert f"{ROOT}/" not in log, "it ran from the checkout"
    (http,) = re.findall(r"http://\S+", line)
    with urllib.request.urlopen(f"{http}/health", timeout=10) as health:
        assert health.status == 200
    assert len(ray.living_actors("RankActor")) == len(ray.living_actors("Supervisor")) == 1
    assert len(ray.placement_groups()) == 1
    _stop(ray, "one")


@pytest.mark.slow  # two starts more
def test_a_job_clears_up_what_an_earlier_one_of_its_name_left(
    ray: DashboardRay, options: tuple[str | Path, ...]
) -> None:
    """Driver and supervisor died together, as with their machine: a rank then holds every CPU, and nobody is
    left to end it but the next cluster of that name."""
    orphan = _leave_an_orphan(ray, options)
    _submit(ray, "three", options)
    await_line(lambda: ray.job_log("three"), "job serves ", 60)
    (rank,) = ray.living_actors("RankActor")
    assert rank["pid"] != orphan
    _stop(ray, "three")


def _stop(ray: DashboardRay, submission_id: str) -> None:
    """As a user does; nothing stays."""
    with ray.job("stop", submission_id) as stopping:
        await_that(lambda: ray.living_actors() == [], "an actor lives on", 30)
        said, _ = stopping.communicate(timeout=60)
    assert stopping.returncode == 0, said
    await_that(lambda: ray.placement_groups() == [], "a placement group lives on")
    assert ray.job_info(submission_id)["status"] == "STOPPED"


def _leave_an_orphan(ray: DashboardRay, options: tuple[str | Path, ...]) -> int:
    """A rank without driver and supervisor; its pid."""
    _submit(ray, "two", options)
    await_that(lambda: [one["state"] for one in ray.living_actors("RankActor")] == ["ALIVE"], "no rank", 60)
    (supervisor,) = ray.living_actors("Supervisor")
    for pid in (int(ray.job_info("two")["driver_info"]["pid"]), supervisor["pid"]):
        os.kill(pid, signal.SIGKILL)
    await_that(lambda: ray.living_actors("Supervisor") == [], "the supervisor lives on")
    (rank,) = ray.living_actors("RankActor")
    pid: int = rank["pid"]
    return pid


def _submit(ray: DashboardRay, submission_id: str, options: tuple[str | Path, ...]) -> None:
    asked = ("--no-wait", "--submission-id", submission_id, *options)
    with ray.job("submit", *asked, *SERVE, "cluster.yaml") as submitting:
        said, _ = submitting.communicate(timeout=60)
    assert submitting.returncode == 0, said
