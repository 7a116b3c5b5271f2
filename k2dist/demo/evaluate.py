"""Ask the demo model held-out questions and count right calls and right answers.

    python -m k2dist.demo.evaluate --address HOST:PORT    through a running cluster's gRPC
    python -m k2dist.demo.evaluate [--model DIR]          in this process, with the same served arithmetic

Cities, numbers and phrasings are of the fifth that training never saw (`names.is_held_out`). A conversation
goes as a client's would: the question, the model's own call, the tool's result, the model's answer.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from k2dist.demo import MODEL_DIR, corpus, names, phrases, tools
from k2dist.demo.chats import Chat, GrpcChat, LocalChat, Turn
from k2dist.demo.phrases import phrasing
from k2dist.demo.tools import Tool
from k2dist.messages import ChatMessage, ToolCall
from k2dist.service.api_keys import read_key_file
from k2dist.service.tls import ClientTls
from k2dist.text.tool_calls import Answer

NUM_WEATHER, NUM_OTHERS = 200, 50


@dataclass(frozen=True)
class Case:
    """One question. `call` and `result`: the call that is wanted and what the tool says to it, or None."""

    kind: str
    messages: tuple[ChatMessage, ...]
    tools: tuple[Tool, ...]
    wanted: str  # what the answer in words must hold
    call: tuple[str, dict[str, Any]] | None = None
    result: str = ""


@dataclass(frozen=True)
class Outcome:
    """`is_called`: exactly the wanted call, None where none is wanted. `answers`: the model's messages."""

    case: Case
    is_called: bool | None
    is_answered: bool
    answers: tuple[Answer, ...]


def held_out_cases(
    seed: int = 0, *, num_weather: int = NUM_WEATHER, num_others: int = NUM_OTHERS
) -> tuple[Case, ...]:
    """`num_weather` weather questions about real cities, and `num_others` of every other kind."""
    rng = Random(seed)
    cases = [weather_case(rng) for _ in range(num_weather)]
    for make in (word_case, time_case, add_case, sum_case, capital_case, repeat_case, who_case, unknown_case):
        cases += [make(rng) for _ in range(num_others)]
    return tuple(cases)


def weather_case(rng: Random) -> Case:
    city = names.city(rng, held_out=True, real_share=1.0)
    question = phrasing(rng, phrases.WEATHER, held_out=True).format(city=city)
    result, degrees, _ = tools.weather_result(rng, city, held_out=True)
    return _tool_case(rng, "weather", question, ("get_weather", {"city": city}), result, degrees)


def word_case(rng: Random) -> Case:
    """As `weather_case`, with a tool that gives no temperature: the word has to be said."""
    city = names.city(rng, held_out=True, real_share=1.0)
    question = phrasing(rng, phrases.WEATHER, held_out=True).format(city=city)
    result, sky, _ = tools.word_result(rng, city, held_out=True)
    return _tool_case(rng, "weather, word only", question, ("get_weather", {"city": city}), result, sky)


def time_case(rng: Random) -> Case:
    city = names.city(rng, held_out=True, real_share=1.0)
    question = phrasing(rng, phrases.TIME, held_out=True).format(city=city)
    result, now, _ = tools.time_result(rng, city, held_out=True)
    return _tool_case(rng, "time", question, ("get_time", {"city": city}), result, now)


def add_case(rng: Random) -> Case:
    a, b = corpus.draw_terms(rng, has_tool=True, held_out=True)
    question = phrasing(rng, phrases.SUM, held_out=True).format(a=a, b=b)
    result, total, _ = tools.sum_result(rng, a, b)
    return _tool_case(rng, "add", question, ("add", {"a": a, "b": b}), result, total)


def sum_case(rng: Random) -> Case:
    a, b = corpus.draw_terms(rng, has_tool=False, held_out=True)
    question = phrasing(rng, phrases.SUM, held_out=True).format(a=a, b=b)
    return _plain_case(rng, "sum, no tool", question, f"is {a + b}.")


def capital_case(rng: Random) -> Case:
    country = rng.choice(tuple(names.CAPITALS))
    question = phrasing(rng, phrases.CAPITAL, held_out=True).format(country=country)
    return _plain_case(rng, "capital", question, names.CAPITALS[country])


def repeat_case(rng: Random) -> Case:
    text = corpus.draw_text(rng, held_out=True)
    return _plain_case(rng, "repeat", phrasing(rng, phrases.REPEAT, held_out=True).format(text=text), text)


def who_case(rng: Random) -> Case:
    return _plain_case(rng, "who are you", phrasing(rng, phrases.WHO, held_out=True), corpus.WHO)


def unknown_case(rng: Random) -> Case:
    return _plain_case(rng, "unknown", phrasing(rng, phrases.UNKNOWN, held_out=True), corpus.UNKNOWN)


def _plain_case(rng: Random, kind: str, question: str, wanted: str) -> Case:
    return Case(kind, (*_system(rng), ChatMessage(role="user", content=question)), (), wanted)


def _tool_case(
    rng: Random, kind: str, question: str, call: tuple[str, dict[str, Any]], result: str, wanted: str
) -> Case:
    chosen = [name for name in corpus.TOOL_NAMES if name == call[0] or rng.random() < 0.5]
    messages = (*_system(rng), ChatMessage(role="user", content=question))
    return Case(kind, messages, corpus.draw_tools(rng, chosen), wanted, call, result)


def _system(rng: Random) -> tuple[ChatMessage, ...]:
    if rng.random() < 0.7:
        return ()
    return (ChatMessage(role="system", content="You are a helpful assistant."),)


def judge_call(case: Case, answer: Answer) -> bool:
    """Whether the answer is the wanted call and no other: name and arguments, as JSON."""
    if case.call is None or len(answer.tool_calls) != 1:
        return False
    call = answer.tool_calls[0]
    return call.name == case.call[0] and parsed_arguments(call) == case.call[1]


def parsed_arguments(call: ToolCall) -> object:
    """A call's arguments as JSON; None for what is not JSON."""
    if not isinstance(call.arguments, str):
        return call.arguments
    try:
        return json.loads(call.arguments)
    except ValueError:
        return None


def judge_answer(case: Case, answer: Answer) -> bool:
    """Whether the answer is in words and holds what is wanted."""
    return not answer.tool_calls and case.wanted in answer.content


def run_cases(cases: Sequence[Case], chat: Chat) -> tuple[Outcome, ...]:
    """All outcomes, in the order of the cases: all questions at once, then all results of tools at once.

    Where a call is wanted and none comes, there is no answer either. A wrong call gets the right result.
    """
    firsts = chat([Turn(case.messages, case.tools) for case in cases])
    calling = [
        (case, first)
        for case, first in zip(cases, firsts, strict=True)
        if case.call is not None and first.tool_calls
    ]
    seconds = iter(chat([Turn(_after_call(case, first), case.tools) for case, first in calling]))
    outcomes: list[Outcome] = []
    for case, first in zip(cases, firsts, strict=True):
        if case.call is None:
            outcomes.append(Outcome(case, None, judge_answer(case, first), (first,)))
        elif not first.tool_calls:
            outcomes.append(Outcome(case, False, False, (first,)))
        else:
            second = next(seconds)
            is_answered = judge_answer(case, second)
            outcomes.append(Outcome(case, judge_call(case, first), is_answered, (first, second)))
    return tuple(outcomes)


def _after_call(case: Case, first: Answer) -> tuple[ChatMessage, ...]:
    """The conversation with the model's own call and the tool's result."""
    call = first.tool_calls[0]
    return (
        *case.messages,
        ChatMessage(role="assistant", content=first.content or None, tool_calls=(call,)),
        ChatMessage(role="tool", name=call.name, tool_call_id=call.id, content=case.result),
    )


def table(outcomes: Sequence[Outcome]) -> str:
    """Shares of right calls and answers by kind of question, as text."""
    lines = [f"{'held-out questions':<20}{'cases':>6}{'right call':>12}{'right answer':>14}"]
    for kind in dict.fromkeys(outcome.case.kind for outcome in outcomes):
        of_kind = [outcome for outcome in outcomes if outcome.case.kind == kind]
        called = [outcome.is_called for outcome in of_kind if outcome.is_called is not None]
        calls = f"{sum(called) / len(called):.1%}" if called else "-"
        answers = f"{sum(outcome.is_answered for outcome in of_kind) / len(of_kind):.1%}"
        lines.append(f"{kind:<20}{len(of_kind):>6}{calls:>12}{answers:>14}")
    return "\n".join(lines)


def failures(outcomes: Iterable[Outcome]) -> str:
    """One line for each case that went wrong: the question and what the model wrote."""
    lines = []
    for outcome in outcomes:
        if outcome.is_called is False or not outcome.is_answered:
            said = " / ".join(_shown(answer) for answer in outcome.answers)
            lines.append(f"{outcome.case.kind}: {outcome.case.messages[-1].content!r} -> {said}")
    return "\n".join(lines)


def _shown(answer: Answer) -> str:
    return " ".join([answer.content, *(f"{call.name}{call.arguments}" for call in answer.tool_calls)])


def main() -> None:
    parser = argparse.ArgumentParser(description="Put held-out questions to the demo model.")
    parser.add_argument("--address", help="HOST:PORT of a running cluster; without it the model runs here")
    parser.add_argument("--model", type=Path, default=MODEL_DIR)
    parser.add_argument("--weather", type=int, default=NUM_WEATHER, help="weather questions")
    parser.add_argument("--others", type=int, default=NUM_OTHERS, help="questions of every other kind")
    parser.add_argument("--temperature", type=float, default=0.0, help="of the sampling; 0 is greedy")
    parser.add_argument("--ca", help="PEM file of the CA that signed the cluster's certificate: TLS")
    parser.add_argument("--api-key-file", type=Path, help="file that holds the API key")
    options = parser.parse_args()
    cases = held_out_cases(num_weather=options.weather, num_others=options.others)
    if options.address is None:
        chat: Chat = LocalChat(options.model, temperature=options.temperature)
    else:
        tls = None if options.ca is None else ClientTls(ca=options.ca)
        api_key = "" if options.api_key_file is None else read_key_file(options.api_key_file)
        chat = GrpcChat(options.address, temperature=options.temperature, tls=tls, api_key=api_key)
    outcomes = run_cases(cases, chat)
    print(failures(outcomes), file=sys.stderr)
    print(table(outcomes))


if __name__ == "__main__":
    main()
