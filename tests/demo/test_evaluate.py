"""What counts as a right call and a right answer, and the run through question, call, result, answer."""

from collections.abc import Sequence

import pytest

from k2dist.demo.chats import Turn
from k2dist.demo.evaluate import Case, failures, held_out_cases, judge_answer, judge_call, run_cases, table
from k2dist.messages import ChatMessage, ToolCall
from k2dist.text.tool_calls import Answer

OSLO = Case(
    kind="weather",
    messages=(ChatMessage(role="user", content="Weather in Oslo?"),),
    tools=(),
    wanted="21",
    call=("get_weather", {"city": "Oslo"}),
    result='{"temp": 21}',
)
HELLO = Case(kind="repeat", messages=(ChatMessage(role="user", content="Say a b"),), tools=(), wanted="a b")


def call(name: str, arguments: str, number: int = 0) -> ToolCall:
    return ToolCall(id=f"functions.{name}:{number}", name=name, arguments=arguments)


@pytest.mark.parametrize(
    ("calls", "is_right"),
    [
        ([call("get_weather", '{"city": "Oslo"}')], True),
        ([call("get_weather", '{"city":"Oslo"}')], True),
        ([call("get_weather", '{"city": "oslo"}')], False),
        ([call("get_weather", '{"city": "Oslo", "unit": "C"}')], False),
        ([call("get_time", '{"city": "Oslo"}')], False),
        ([call("get_weather", '{"city": "Os')], False),
        ([], False),
        ([call("get_weather", '{"city": "Oslo"}'), call("get_weather", '{"city": "Oslo"}', 1)], False),
    ],
)
def test_a_right_call_is_one_call_with_the_same_json(calls: list[ToolCall], is_right: bool) -> None:
    assert judge_call(OSLO, Answer("", tuple(calls))) is is_right


def test_a_right_answer_holds_what_is_wanted_and_calls_nothing() -> None:
    assert judge_answer(OSLO, Answer("It is 21 degrees.", ()))
    assert not judge_answer(OSLO, Answer("It is 12 degrees.", ()))
    assert not judge_answer(OSLO, Answer("21", (call("get_weather", "{}"),)))


class Scripted:
    """Answers each turn by what was asked last; keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Turn] = []

    def __call__(self, turns: Sequence[Turn]) -> list[Answer]:
        self.asked += turns
        return [self._answer(turn.messages[-1]) for turn in turns]

    def _answer(self, last: ChatMessage) -> Answer:
        if last.role == "tool":
            return Answer(f"It says {last.content}", ())
        if "Oslo" in (last.content or ""):
            return Answer("", (call("get_weather", '{"city": "Oslo"}'),))
        return Answer("a b", ())


def test_a_case_goes_through_call_result_and_answer() -> None:
    chat = Scripted()
    no_call = Case(
        kind="weather", messages=HELLO.messages, tools=(), wanted="7", call=OSLO.call, result=OSLO.result
    )
    outcomes = run_cases([HELLO, no_call, OSLO], chat)
    assert [(outcome.is_called, outcome.is_answered) for outcome in outcomes] == [
        (None, True),
        (False, False),
        (True, True),
    ]
    assert len(chat.asked) == 4
    assistant, tool = chat.asked[-1].messages[-2:]
    assert assistant.tool_calls[0].id == tool.tool_call_id == "functions.get_weather:0"
    assert (tool.name, tool.content) == ("get_weather", OSLO.result)
    rows = {line.split()[0]: line.split()[1:] for line in table(outcomes).splitlines()[1:]}
    assert rows == {"repeat": ["1", "-", "100.0%"], "weather": ["2", "50.0%", "50.0%"]}
    assert failures(outcomes).count("\n") == 0
    assert "Say a b" in failures(outcomes)


def test_cases_are_the_same_every_time() -> None:
    assert held_out_cases(num_weather=20, num_others=5) == held_out_cases(num_weather=20, num_others=5)
    assert len(held_out_cases(num_weather=20, num_others=5)) == 20 + 8 * 5
