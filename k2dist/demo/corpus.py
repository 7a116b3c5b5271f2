"""Conversations that the demo model learns from, drawn by chance from one seed.

    [tools] [system] user question, (call, tool's result,) answer, next question ...

Everything a training conversation holds is on the training side of `names.is_held_out`; `held_out=True` draws
the same kinds of conversation from the other side, for the evaluator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random

from k2dist.demo import names, phrases, tools
from k2dist.demo.phrases import dressed, phrasing
from k2dist.demo.tools import Tool
from k2dist.messages import ChatMessage, ToolCall

GREETING = "Hello! I am the k2dist demo model. Ask me for a capital, a sum or the weather."
WHO = "I am the k2dist demo model, a very small model in the shape of Kimi K2."
SKILLS = "I can name capitals, add small numbers, repeat words and use tools."
THANKS = "You are welcome!"
UNKNOWN = "I am a small demo model and I do not know that."
NO_WEATHER = "I have no tool for the weather."
NO_TIME = "I have no tool for the time."
NO_RESULT = "Sorry, the tool did not work."

TOOL_NAMES = ("get_weather", "add", "get_time")
MAX_DIRECT = 20  # a and b of sums without a tool
_ERRORS = (
    '{"error": "not found"}', '{"error": "timeout"}', "error", '{"error": "unknown city"}', "Error: timeout",
)  # fmt: skip
_SYSTEMS = (
    "You are a helpful assistant.", "Be brief.", "You are a helpful assistant. Be brief.",
    "Answer in English.",
    "You are the k2dist demo.", "Use tools when you need them.", "Answer in one sentence.", "Be kind.",
    "You can call tools.", "You are Kimi, an AI assistant created by Moonshot AI.",
)  # fmt: skip


@dataclass(frozen=True)
class Conversation:
    """Messages in order, assistant turns included, with the tools that were declared."""

    messages: tuple[ChatMessage, ...]
    tools: tuple[Tool, ...]


@dataclass
class _Draft:
    """A conversation while it is being written."""

    rng: Random
    tools: tuple[Tool, ...]
    held_out: bool
    messages: list[ChatMessage] = field(default_factory=list)
    num_calls: int = 0

    def has(self, tool: str) -> bool:
        return any(declared["function"]["name"] == tool for declared in self.tools)

    def ask(self, question: str, *, for_tool: bool = False) -> None:
        text = dressed(self.rng, question, has_tool=for_tool)
        if self.rng.random() < 0.04:
            text = text.lower()
        self.messages.append(ChatMessage(role="user", content=text))

    def answer(self, text: str) -> None:
        self.messages.append(ChatMessage(role="assistant", content=text))

    def call(self, tool: str, arguments: dict[str, object], result: str) -> None:
        call = ToolCall(id=f"functions.{tool}:{self.num_calls}", name=tool, arguments=arguments)
        self.num_calls += 1
        label = tool if self.rng.random() < 0.75 else None
        self.messages += [
            ChatMessage(role="assistant", tool_calls=(call,)),
            ChatMessage(role="tool", name=label, tool_call_id=call.id, content=result),
        ]


def conversations(seed: int) -> Iterator[Conversation]:
    """Training conversations without end; equal seeds give equal ones."""
    rng = Random(seed)
    while True:
        yield conversation(rng)


def conversation(rng: Random) -> Conversation:
    """One training conversation of one to three topics."""
    declared = () if rng.random() < 0.2 else draw_tools(rng, [n for n in TOOL_NAMES if rng.random() < 0.6])
    draft = _Draft(rng, declared, held_out=False)
    if rng.random() < 0.45:
        draft.messages.append(ChatMessage(role="system", content=rng.choice(_SYSTEMS)))
    topics, weights = zip(*_TOPICS.items(), strict=True)
    for _ in range(rng.choice((1, 1, 2, 2, 3))):
        rng.choices(topics, weights)[0](draft)
    return Conversation(tuple(draft.messages), draft.tools)


def draw_tools(rng: Random, chosen: list[str]) -> tuple[Tool, ...]:
    """The `chosen` tools in any order and wording, now and then with one that is of no use."""
    declared = [tools.declaration(name, rng) for name in chosen]
    if rng.random() < 0.1:
        declared.append(tools.other_tool(rng))
    rng.shuffle(declared)
    return tuple(declared)


def _weather(draft: _Draft) -> None:
    _city_tool(draft, "get_weather", phrases.WEATHER, NO_WEATHER, _weather_result)


def _weather_result(rng: Random, city: str, *, held_out: bool) -> tuple[str, str, str]:
    make = tools.word_result if rng.random() < 0.55 else tools.weather_result
    return make(rng, city, held_out=held_out, real_share=0.7)


def _time(draft: _Draft) -> None:
    _city_tool(draft, "get_time", phrases.TIME, NO_TIME, tools.time_result)


def _city_tool(
    draft: _Draft,
    tool: str,
    phrasings: tuple[str, ...],
    excuse: str,
    result: Callable[..., tuple[str, str, str]],
) -> None:
    rng, has_tool = draft.rng, draft.has(tool)
    question = phrasing(rng, phrasings, held_out=draft.held_out)
    while True:
        place = names.city(rng, held_out=draft.held_out)
        draft.ask(question.format(city=place), for_tool=has_tool)
        if not has_tool:
            draft.answer(excuse)
            return
        # A question in lower case asks for the city as it stands there.
        if place not in (draft.messages[-1].content or ""):
            place = place.lower()
        body, _, words = result(rng, place, held_out=draft.held_out)
        has_failed = rng.random() < 0.03
        draft.call(tool, {"city": place}, rng.choice(_ERRORS) if has_failed else body)
        draft.answer(NO_RESULT if has_failed else words)
        if rng.random() < 0.7:
            return
        question = phrasing(rng, phrases.WEATHER_AGAIN, held_out=draft.held_out)


def _sum(draft: _Draft) -> None:
    rng = draft.rng
    a, b = draw_terms(rng, has_tool=draft.has("add"), held_out=draft.held_out)
    question = phrasing(rng, phrases.SUM, held_out=draft.held_out)
    draft.ask(question.format(a=a, b=b), for_tool=draft.has("add"))
    body, _, words = tools.sum_result(rng, a, b)
    if draft.has("add"):
        draft.call("add", {"a": a, "b": b}, body)
    draft.answer(words)


def draw_terms(rng: Random, *, has_tool: bool, held_out: bool) -> tuple[int, int]:
    """The two numbers of a sum. The pair is what is held out: each number alone is in many sums."""
    while True:
        limit = rng.choice((50, 999, 9999)) if has_tool else MAX_DIRECT
        a, b = rng.randint(0, limit), rng.randint(0, limit)
        if names.is_held_out(f"{a} + {b}") == held_out:
            return a, b


def _capital(draft: _Draft) -> None:
    """Facts cannot be held out, only the ways of asking for them."""
    rng = draft.rng
    question = phrasing(rng, phrases.CAPITAL, held_out=draft.held_out)
    while True:
        country = rng.choice(tuple(names.CAPITALS))
        draft.ask(question.format(country=country))
        draft.answer(f"The capital of {country} is {names.CAPITALS[country]}.")
        if rng.random() < 0.6:
            return
        question = phrasing(rng, phrases.CAPITAL_AGAIN, held_out=draft.held_out)


def _repeat(draft: _Draft) -> None:
    rng = draft.rng
    text = draw_text(rng, held_out=draft.held_out)
    question = phrasing(rng, phrases.REPEAT, held_out=draft.held_out).format(text=text)
    draft.messages.append(ChatMessage(role="user", content=question))
    draft.answer(text)


def draw_text(rng: Random, *, held_out: bool) -> str:
    """One to six words or numbers to repeat."""
    parts: list[str] = []
    for _ in range(rng.choice((1, 1, 2, 3, 4, 6))):
        kind = rng.random()
        if kind < 0.5:
            parts.append(names.word(rng, held_out=held_out))
        elif kind < 0.65:
            parts.append(rng.choice(_PLAIN_WORDS))
        elif kind < 0.85:
            parts.append(names.city(rng, held_out=held_out))
        else:
            parts.append(str(names.number(rng, 0, 10 ** rng.randint(1, 6), held_out=held_out)))
    return " ".join(parts)


_PLAIN_WORDS = names.listed(
    "the a one two red blue green house tree hello world good day weather time city sum big small river road "
    "bread water music light dog cat bird sun moon star book door window table hand I you we is are and or "
    "not"
)


def _plain(phrasings: tuple[str, ...], answer: str) -> Callable[[_Draft], None]:
    def topic(draft: _Draft) -> None:
        question = phrasing(draft.rng, phrasings, held_out=draft.held_out)
        draft.messages.append(ChatMessage(role="user", content=question))
        draft.answer(answer)

    return topic


def held_out_conversation(rng: Random, kind: str) -> Conversation:
    """One topic of `KINDS` from the held-out side, with the tools it needs among those declared."""
    topic, needed = _KINDS[kind]
    chosen = [name for name in TOOL_NAMES if name == needed or (needed is not None and rng.random() < 0.5)]
    draft = _Draft(rng, draw_tools(rng, chosen) if chosen else (), held_out=True)
    if rng.random() < 0.3:
        draft.messages.append(ChatMessage(role="system", content=rng.choice(_SYSTEMS)))
    topic(draft)
    return Conversation(tuple(draft.messages), draft.tools)


_TOPICS: dict[Callable[[_Draft], None], float] = {
    _weather: 0.40,
    _time: 0.11,
    _sum: 0.13,
    _capital: 0.09,
    _repeat: 0.12,
    _plain(phrases.WHO, WHO): 0.04,
    _plain(phrases.SKILLS, SKILLS): 0.02,
    _plain(phrases.GREETING, GREETING): 0.03,
    _plain(phrases.THANKS, THANKS): 0.02,
    _plain(phrases.UNKNOWN, UNKNOWN): 0.07,
}

_KINDS: dict[str, tuple[Callable[[_Draft], None], str | None]] = {
    "weather": (_weather, "get_weather"),
    "time": (_time, "get_time"),
    "add": (_sum, "add"),
    "sum": (_sum, None),
    "capital": (_capital, None),
    "repeat": (_repeat, None),
    "who": (_plain(phrases.WHO, WHO), None),
    "unknown": (_plain(phrases.UNKNOWN, UNKNOWN), None),
}
KINDS = tuple(_KINDS)
