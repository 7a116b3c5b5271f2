"""However a cluster ends, nothing of it stays, and one line says why."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from pathlib import Path

import psutil

from k2dist.cluster.process_mark import find_process
from k2dist.cluster.ray_host import HostProcess
from tests.e2e.command import Command, actors_of, await_that, is_living, write_config

BEFORE_RAY_S = 30.0  # far less than a cluster takes, on a machine as busy


# -- found before anything is started ------------------------------------------------------------------------


def refused(*arguments: str | Path) -> tuple[int, str]:
    """Exit code and line of a command that must fail without starting a process."""
    with Command(*arguments) as command:
        exit_code = command.wait(BEFORE_RAY_S)
        assert command.note_tree() == set(), "something was started"
        return exit_code, command.error_line()


def test_a_port_in_use(tmp_path: Path, tiny_model_dir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        config = write_config(tmp_path, "a")
        exit_code, line = refused("serve", config, "--model", tiny_model_dir, "--grpc", address)
    assert exit_code == 1
    assert f"service.grpc={address}: cannot listen there" in line
    assert "k2dist stop" in line


def test_faults_of_a_config_are_a_line_each(tmp_path: Path) -> None:
    config = tmp_path / "bad.yaml"
    config.write_text("name: a\nparallel: {lanes: 0}\nshape: round\n")
    with Command("serve", config) as command:
        assert command.wait(BEFORE_RAY_S) == 2
        lines = command.errors().splitlines()
    assert [line.partition("bad.yaml: ")[2].partition(":")[0] for line in lines] == [
        "shape",
        "parallel.lanes=0",
        "parallel.tp",
    ]


# -- in a Ray that goes on -----------------------------------------------------------------------------------


def test_more_cpus_than_ray_has(ray_host: HostProcess, tmp_path: Path, tiny_model_dir: Path) -> None:
    config = write_config(tmp_path, "large", parallel="{lanes: 2, tp: 2}", ranks="{rank_cpus: 1.5}")
    arguments = ("serve", config, "--model", tiny_model_dir, "--json")
    with Command(*arguments, ray_address=ray_host.address) as command:
        assert command.wait() == 1
        error = command.line()["error"]
    assert error["kind"] == "CapacityError"
    assert "4 ranks x 1.5 CPU = 6 CPU, and Ray has 2;" in error["message"]
    assert actors_of(ray_host.mark.pid, "Supervisor") == []


def test_a_rank_that_dies_while_loading_is_named(
    ray_host: HostProcess, tmp_path: Path, tiny_model_dir: Path
) -> None:
    config = write_config(tmp_path, "dying", parallel="{lanes: 1, tp: 2}")
    with Command("serve", config, "--model", tiny_model_dir, ray_address=ray_host.address) as command:
        await_that(lambda: len(actors_of(ray_host.mark.pid, "RankActor")) == 2, "no ranks", 60)
        max(actors_of(ray_host.mark.pid, "RankActor"), key=lambda process: process.pid).kill()
        assert command.wait() == 1
        line = command.error_line()
    assert "'dying' ended: world rank " in line
    assert "died while " in line
    await_that(lambda: actors_of(ray_host.mark.pid, "RankActor") == [], "the other rank lives")
    await_that(lambda: actors_of(ray_host.mark.pid, "Supervisor") == [], "the supervisor lives")


def test_a_rank_that_dies_in_its_sleep_is_named(
    ray_host: HostProcess, tmp_path: Path, tiny_model_dir: Path
) -> None:
    """Nobody waits for it in a collective then: its host sees it go, and the other rank is woken to end."""
    config = write_config(tmp_path, "asleep", parallel="{lanes: 1, tp: 2}", ranks="{rank_cpus: 0.5}")
    with Command(
        "serve", config, "--model", tiny_model_dir, "--json", ray_address=ray_host.address
    ) as command:
        ranks = command.line()["ranks"]
        time.sleep(0.5)
        psutil.Process(ranks[1]["pid"]).kill()
        began_s = time.monotonic()
        assert command.wait() == 1
        assert time.monotonic() - began_s < 30, "longer than it takes to stop"
        message = json.loads(command.output())["error"]["message"]
    assert "world rank 1" in message
    await_that(lambda: actors_of(ray_host.mark.pid, "RankActor") == [], "the other rank lives")
    await_that(lambda: actors_of(ray_host.mark.pid, "Supervisor") == [], "the supervisor lives")


def test_a_dead_driver_loses_its_lease(ray_host: HostProcess, tmp_path: Path, tiny_model_dir: Path) -> None:
    """Its rank holds every CPU meanwhile, so that another cluster waits in vain, and says what is missing."""
    config = write_config(
        tmp_path,
        "leased",
        ranks="{rank_cpus: 2}",
        deadlines="{lease_beat_s: 0.5, lease_s: 5, drain_s: 5, stop_s: 5}",
    )
    late_config = write_config(tmp_path, "late", deadlines="{start_s: 4}")
    arguments = ("serve", config, "--model", tiny_model_dir, "--json")
    with Command(*arguments, ray_address=ray_host.address) as command:
        command.line()
        with Command("serve", late_config, "--model", tiny_model_dir, ray_address=ray_host.address) as late:
            assert late.wait() == 1  # longer after than a lease without beats
            assert "they need 1 CPU and 0 GPU, free are 0 and 0 of 2 and 0" in late.error_line()
        (rank,) = actors_of(ray_host.mark.pid, "RankActor")
        command.process.send_signal(signal.SIGKILL)
        command.process.wait()
        time.sleep(1.0)
        assert is_living(rank), "a lease outlives its last beat"
        for kind in ("RankActor", "CoordinatorActor", "Supervisor"):
            await_that(lambda kind=kind: actors_of(ray_host.mark.pid, kind) == [], f"the {kind} lives")
    assert find_process(ray_host.mark) is not None


# -- with a Ray of its own -----------------------------------------------------------------------------------


def test_a_killed_driver_takes_its_ray_along(tmp_path: Path, tiny_model_dir: Path) -> None:
    config = write_config(tmp_path, "own")
    with Command("serve", config, "--model", tiny_model_dir, "--json") as command:
        command.line()
        names = {process.name() for process in command.note_tree() if is_living(process)}
        assert {"raylet", "gcs_server", "ray::RankActor"} <= names
        os.killpg(command.process.pid, signal.SIGKILL)
        assert command.wait() == -signal.SIGKILL
        await_that(lambda: command.living() == [], f"left: {command.living()}")


def test_ctrl_c_in_the_middle_leaves_nothing(tiny_model_dir: Path) -> None:
    """The random model does not come to an end by itself."""
    with Command(
        "demo", "--model", tiny_model_dir, "--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0"
    ) as command:
        assert command.process.stdout is not None
        lines = [command.process.stdout.readline().decode() for _ in range(4)]
        assert lines[0] == "    who ? Who are you?\n"
        assert lines[3][7:10] == " | ", "it streams"
        names = {process.name().partition(".")[0] for process in command.note_tree()}
        assert {"raylet", "ray::RankActor"} <= names
        os.killpg(command.process.pid, signal.SIGINT)  # as a terminal does
        assert command.wait() == 130, command.errors()
        await_that(lambda: command.living() == [], f"left: {command.living()}")
