"""`k2dist demo` from the command to the exit code, with a model that says nothing sensible."""

from __future__ import annotations

from pathlib import Path

from tests.e2e.command import Command, await_that


def test_the_demo_runs_shows_and_leaves_nothing(tiny_model_dir: Path) -> None:
    with Command("demo", "--model", tiny_model_dir, "--grpc", "127.0.0.1:0", "--json") as command:
        report = command.line()
        assert command.wait() == 0, command.errors()
        await_that(lambda: command.living() == [], f"left: {command.living()}")
    assert [talk["name"] for talk in report["talks"]] == ["who", "capital", "weather"]
    assert all(0 < talk["first_token_s"] <= talk["total_s"] for talk in report["talks"])
    assert {talk["lane"] for talk in report["talks"]} == {0, 1}
    assert [(rank["lane"], rank["tp_rank"]) for rank in report["ranks"]] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert sorted(e for rank in report["ranks"] for e in rank["experts"]) == list(range(12))
    assert all(rank["num_rows_sent"] > 0 for rank in report["ranks"])
    assert not report["is_left_running"]
