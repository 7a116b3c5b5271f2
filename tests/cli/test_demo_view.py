"""Where there is no terminal: lines of one conversation each, in the order in which they came."""

from __future__ import annotations

import io
from queue import SimpleQueue

import pytest

from k2dist.cli.demo_report import TalkReport, _runs
from k2dist.cli.demo_view import Chunk, Talk, watch_talks

TALKS = (Talk("a", "One?"), Talk("long", "Two?"))


def shown(*chunks: tuple[int, str | None], is_quiet: bool = False) -> list[str]:
    queue: SimpleQueue[Chunk] = SimpleQueue()
    for index, text in chunks:
        queue.put(Chunk(index, text))
    out = io.StringIO()
    watch_talks(TALKS, queue, is_quiet=is_quiet, out=out)
    return out.getvalue().splitlines()


def test_lines_say_whose_they_are_in_the_order_of_arrival() -> None:
    assert shown((0, "x" * 20), (1, "y" * 30), (0, "z" * 10), (1, None), (0, "!"), (0, None)) == [
        "   a ? One?",
        "long ? Two?",
        "long | " + "y" * 30,
        "   a | " + "x" * 20 + "z" * 10,
        "   a | !",
    ]


def test_nothing_is_lost_and_newlines_stay_within_their_line() -> None:
    lines = shown((0, "first\nsecond"), (0, None), (1, None))
    assert lines[2:] == ["   a | first\\nsecond"]


def test_quiet_waits_for_the_end_and_says_nothing() -> None:
    assert shown((0, "text"), (1, None), (0, None), is_quiet=True) == []


@pytest.mark.parametrize(
    ("experts", "text"), [((), ""), ((3,), "3"), ((0, 1, 2), "0-2"), ((0, 1, 5, 7, 8), "0-1, 5, 7-8")]
)
def test_experts_are_listed_in_runs(experts: tuple[int, ...], text: str) -> None:
    assert _runs(experts) == text


def test_tokens_per_second_are_of_the_whole_conversation() -> None:
    talk = TalkReport(
        name="a",
        question="",
        answer="",
        tool_calls=(),
        finish_reason="stop",
        lane=0,
        num_prompt_tokens=1,
        num_tokens=30,
        first_token_s=0.5,
        total_s=2.0,
    )
    assert talk.tokens_per_s == 15.0
