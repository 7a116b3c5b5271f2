"""The way of a request, as lines that a person reads from top to bottom."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from k2dist.cli.app import app
from k2dist.cli.trace import lines_of
from k2dist.messages import Course
from k2dist.observe import OutputTrace, Trace


def test_what_happened_is_told_in_its_order() -> None:
    course = Course(queued_s=0.5, cached_tokens=64, num_chunks=3, num_preemptions=1)
    output = OutputTrace(
        first_token_s=1.25, last_token_s=3.5, ended_s=3.5, num_tokens=40, finish="stop", course=course
    )
    trace = Trace(
        request_id="chatcmpl-1",
        arrived_at=1_764_300_000.5,
        tenant="lab",
        priority=0,
        num_prompt_tokens=100,
        lane=1,
        sent_s=0.125,
        accepted_s=0.25,
        ended_s=3.5,
        outputs=(output,),
    )
    assert list(lines_of(trace)) == [
        "chatcmpl-1: 100 prompt tokens, 1 output, tenant 'lab'",
        "     0.000 s  arrived at 2025-11-28 03:20:00.500 UTC",
        "     0.125 s  sent to lane 1",
        "     0.250 s  accepted by lane 1",
        "     0.750 s  began to run, 64 prompt tokens found in the cache",
        "     1.250 s  first token, after 3 chunks of the prompt",
        "     3.500 s  ended (stop) with 40 tokens, preempted 1 time",
    ]


def test_a_request_under_way_says_how_far_it_is() -> None:
    outputs = (
        OutputTrace(first_token_s=0.5, last_token_s=0.75, num_tokens=7, course=Course(num_chunks=1)),
        OutputTrace(),
    )
    trace = Trace(
        request_id="a",
        arrived_at=0.0,
        tenant="",
        priority=2,
        num_prompt_tokens=1,
        lane=0,
        sent_s=0.0,
        accepted_s=0.25,
        outputs=outputs,
    )
    assert list(lines_of(trace)) == [
        "a: 1 prompt token, 2 outputs, priority 2",
        "     0.000 s  arrived at 1970-01-01 00:00:00.000 UTC",
        "     0.000 s  sent to lane 0",
        "     0.250 s  accepted by lane 0",
        "     0.250 s  output 0: began to run",
        "     0.500 s  output 0: first token, after 1 chunk of the prompt",
        "     0.750 s  output 0: newest token, 7 tokens so far",
        "            it goes on",
    ]


def test_it_shows_its_key_where_one_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it a secured cluster says nothing of any request."""
    (tmp_path / "key").write_text("k2_a_b\n")
    shown: dict[str, Any] = {}

    class AskedError(Exception):
        """Instead of a connection."""

    def connect(address: str, **access: Any) -> None:
        shown.update(access, address=address)
        raise AskedError

    monkeypatch.setattr("k2dist.cli.trace.Client", connect)
    arguments = ["inspect", "trace", "a", "--address", "h:1", "--ca", "ca.pem"]
    ended = CliRunner().invoke(app, [*arguments, "--api-key-file", str(tmp_path / "key")])
    assert isinstance(ended.exception, AskedError)
    assert (shown["address"], shown["api_key"], shown["tls"].ca) == ("h:1", "k2_a_b", "ca.pem")
