"""A step's cost grows with the rows it grants, not with who waits; and the command says what it costs."""

import sys

import msgspec
import pytest
from typer.testing import CliRunner, Result

from k2dist.bench.scheduler import PAGE_TOKENS, full_lane, made_up
from k2dist.cli.app import app
from k2dist.ids import Generation


def calls_a_step(num_decoding: int, num_waiting: int) -> float:
    """Calls, of Python and of C functions, in planning and committing a step: on average over a page."""
    scheduler, num_calls = full_lane(num_decoding, num_waiting, PAGE_TOKENS), 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal num_calls
        num_calls += event in ("call", "c_call")

    for step in range(1, PAGE_TOKENS + 1):
        sys.setprofile(count)
        plan = scheduler.plan(Generation(0), step, 0.0)
        sys.setprofile(None)
        result = made_up(plan)
        sys.setprofile(count)
        scheduler.commit(result, 0.0)
        sys.setprofile(None)
    return num_calls / PAGE_TOKENS


def test_who_waits_costs_nothing() -> None:
    """But for a look whether there is a place for the first of them."""
    assert calls_a_step(64, 5000) == calls_a_step(64, 10)
    assert calls_a_step(64, 10) <= calls_a_step(64, 0) + 4


def test_the_cost_is_linear_in_the_rows() -> None:
    few, many = calls_a_step(64, 0), calls_a_step(1024, 0)
    assert many <= 16 * few
    assert many <= 16 * 1024, "so many calls to each row take more than its 2 us"


def bench(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", "scheduler", *arguments])


def test_the_command_prints_a_line_for_each_case() -> None:
    result = bench("--decoding", "3", "--decoding", "5", "--waiting", "2", "--steps", "4")
    rows = [line.split() for line in result.output.splitlines() if line.split()[:1] in (["3"], ["5"])]
    assert [row[:2] for row in rows] == [["3", "2"], ["5", "2"]]
    assert all(len(row) == 8 and float(time) > 0 for row in rows for time in row[2:])


def test_the_command_gives_data() -> None:
    result = bench("--decoding", "3", "--steps", "4", "--json")
    (cost,) = msgspec.json.decode(result.output)["scheduler"]
    assert (cost["num_decoding"], cost["num_waiting"], cost["num_steps"]) == (3, 0, 4)
    assert 0 < cost["step_ms_min"] <= cost["step_ms"] <= cost["step_ms_max"]
    assert cost["row_us"] == pytest.approx(1e3 * cost["step_ms"] / 3)
