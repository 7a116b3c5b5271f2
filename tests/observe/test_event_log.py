"""A log line is an event with fields, as text or as JSON."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from typing import Literal

import pytest

from k2dist.observe.event_log import EventFormatter, EventLog, set_up_logs


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    logger = logging.getLogger("k2dist.test")
    before = logger.handlers[:]
    yield logger
    logger.handlers = before
    logger.propagate = True


def lines(logger: logging.Logger, form: Literal["text", "json"]) -> io.StringIO:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(EventFormatter(form, {"process": "rank-3"}))
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)
    return stream


def test_json_holds_every_field_as_it_is(logger: logging.Logger) -> None:
    stream = lines(logger, "json")
    EventLog(logger).info("lane.preempted", seq_id=7, pages=[1, 2], why='a "reason"\n')
    line = json.loads(stream.getvalue())
    assert line.pop("at").endswith("Z")
    assert line == {
        "level": "info",
        "event": "lane.preempted",
        "logger": "k2dist.test",
        "process": "rank-3",
        "seq_id": 7,
        "pages": [1, 2],
        "why": 'a "reason"\n',
    }


def test_text_is_one_line_that_can_be_searched(logger: logging.Logger) -> None:
    stream = lines(logger, "text")
    EventLog(logger).error("lane.lost", lane=1, error="it broke\nin two", empty="")
    (line,) = stream.getvalue().splitlines()
    assert line.endswith(r'ERROR    lane.lost process=rank-3 lane=1 error="it broke\nin two" empty=""')


def test_a_bug_comes_with_its_traceback(logger: logging.Logger) -> None:
    stream = lines(logger, "json")
    try:
        raise ValueError("unforeseen")
    except ValueError as error:
        EventLog(logger).bug("supervisor.bug", error)
    line = json.loads(stream.getvalue())
    assert line["level"] == "critical"
    assert "ValueError: unforeseen" in line["traceback"]


def test_what_is_below_the_level_costs_nothing_and_says_nothing(logger: logging.Logger) -> None:
    stream = lines(logger, "text")
    EventLog(logger).debug("lane.step", step=1)
    assert stream.getvalue() == ""


def test_setting_up_twice_writes_once(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger("k2dist")
    before, level = root.handlers[:], root.level
    try:
        set_up_logs("warning", "text")
        set_up_logs("info", "json", process="gateway")
        EventLog(logging.getLogger("k2dist.x")).info("request.ended", tokens=3)
        (line,) = capsys.readouterr().err.splitlines()
        assert json.loads(line)["process"] == "gateway"
    finally:
        root.handlers = before
        root.setLevel(level)
