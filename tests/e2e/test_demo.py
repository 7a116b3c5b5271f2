"""`k2dist demo` from the command to the exit code, with a model that says nothing sensible."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from tests.e2e.command import Command, await_that

MAX_PSS_BYTES = 3 * 2**30


def test_the_demo_shows_what_ran_and_can_be_kept(tiny_model_dir: Path) -> None:
    arguments = ("--model", tiny_model_dir, "--grpc", "127.0.0.1:0", "--keep", "--json")
    with Command("demo", *arguments) as command:
        report = command.line()
        pss_bytes = sum(process.memory_full_info().pss for process in command.living())
        assert command.wait() == 0, command.errors()
        assert report["is_left_running"]
        ranks = [process for process in command.living() if process.name().startswith("ray::RankActor")]
        assert len(ranks) == 4, "they outlive their driver"
        with Command("stop", "--name", "laptop", "--json") as stop:
            assert stop.line() == {"ended": "laptop"}
            assert stop.wait() == 0
        await_that(lambda: command.living() == [], f"left: {command.living()}")
    with Command("stop", "--name", "laptop") as again:
        assert again.wait() == 2
        assert "'laptop' is not running" in again.error_line()
    assert [talk["name"] for talk in report["talks"]] == ["who", "capital", "weather"]
    assert all(0 < talk["first_token_s"] <= talk["total_s"] for talk in report["talks"])
    assert {talk["lane"] for talk in report["talks"]} <= {0, 1}
    assert [(rank["lane"], rank["tp_rank"]) for rank in report["ranks"]] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert sorted(e for rank in report["ranks"] for e in rank["experts"]) == list(range(12))
    assert all(rank["num_rows_sent"] > 0 for rank in report["ranks"])
    assert pss_bytes < MAX_PSS_BYTES


def test_ctrl_c_in_the_middle_leaves_nothing(tiny_model_dir: Path) -> None:
    question = ("--prompt", "Repeat after me: one two three")
    with Command("demo", "--model", tiny_model_dir, "--grpc", "127.0.0.1:0", *question) as command:
        assert command.process.stdout is not None
        first = [command.process.stdout.readline().decode() for _ in range(2)]
        assert first[0] == "prompt ? Repeat after me: one two three\n"
        assert first[1].startswith("prompt | "), "it streams"
        names = {process.name().partition(".")[0] for process in command.note_tree()}
        assert {"raylet", "ray::RankActor"} <= names
        os.killpg(command.process.pid, signal.SIGINT)  # as a terminal does
        assert command.wait() == 130, command.errors()
        await_that(lambda: command.living() == [], f"left: {command.living()}")
