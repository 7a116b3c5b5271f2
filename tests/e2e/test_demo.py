"""`k2dist demo` from the command to the exit code, with the committed model; then what it left, over gRPC."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from k2dist.cli.chat import run_demo_tool
from k2dist.demo.chats import GrpcChat
from k2dist.demo.corpus import WHO
from k2dist.demo.evaluate import failures, held_out_cases, run_cases
from k2dist.messages import ToolCall
from tests.e2e.command import Command, await_that

MAX_PSS_BYTES = 3 * 2**30


@dataclass(frozen=True)
class Kept:
    """What `demo --keep --json` printed, and the memory of all its processes then."""

    report: dict[str, Any]
    pss_bytes: int


@pytest.fixture(scope="module")
def kept() -> Iterator[Kept]:
    """A demo that was left serving; it is stopped, and nothing of it stays."""
    with Command("demo", "--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0", "--keep", "--json") as command:
        report = command.line()
        pss_bytes = sum(process.memory_full_info().pss for process in command.living())
        assert command.wait() == 0, command.errors()
        ranks = [process for process in command.living() if process.name().startswith("ray::RankActor")]
        assert len(ranks) == 4, "they outlive their driver"
        yield Kept(report, pss_bytes)
        with Command("stop", "--name", "laptop", "--json") as stop:
            assert stop.line() == {"ended": "laptop"}
            assert stop.wait() == 0
        await_that(lambda: command.living() == [], f"left: {command.living()}")
    with Command("stop", "--name", "laptop") as again:
        assert again.wait() == 2
        assert "'laptop' is not running" in again.error_line()


def test_the_demo_shows_what_ran_where(kept: Kept) -> None:
    report = kept.report
    assert report["is_left_running"]
    assert [talk["name"] for talk in report["talks"]] == ["who", "capital", "weather"]
    assert all(0 < talk["first_token_s"] <= talk["total_s"] for talk in report["talks"])
    assert all(talk["lane"] in (0, 1) and talk["num_tokens"] > 0 for talk in report["talks"])
    assert [(rank["lane"], rank["tp_rank"]) for rank in report["ranks"]] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert sorted(e for rank in report["ranks"] for e in rank["experts"]) == list(range(12))
    assert len({rank["num_steps"] for rank in report["ranks"]}) == 1, "lanes step together"
    assert sum(rank["num_rows_sent"] for rank in report["ranks"]) > 0


def test_all_processes_together_take_less_than_3_gib(kept: Kept) -> None:
    assert 0 < kept.pss_bytes < MAX_PSS_BYTES


def test_the_three_conversations_are_answered(kept: Kept) -> None:
    who, capital, weather = kept.report["talks"]
    assert who["answer"] == WHO
    assert "Rome" in capital["answer"]
    (call,) = weather["tool_calls"]
    assert (call["name"], call["arguments"]) == ("get_weather", '{"city": "Paris"}')
    result = run_demo_tool(ToolCall(**call))
    number = re.search(r"-?\d+(\.\d+)?", result)
    assert number is not None
    assert number[0] in weather["answer"]


def test_twenty_held_out_weather_questions_over_grpc(kept: Kept) -> None:
    outcomes = run_cases(held_out_cases(num_weather=20, num_others=0), GrpcChat(kept.report["address"]))
    assert sum(outcome.is_called is True for outcome in outcomes) >= 19, failures(outcomes)
    assert sum(outcome.is_answered for outcome in outcomes) >= 19, failures(outcomes)


def test_a_second_cluster_of_the_name_is_refused_at_once(kept: Kept) -> None:
    """Its record could not be told from the first one's."""
    with Command("demo", "--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0") as command:
        assert command.wait() == 1
        assert command.note_tree() == set(), "something was started"
        assert f"'laptop' is running already, at {kept.report['address']}" in command.error_line()
