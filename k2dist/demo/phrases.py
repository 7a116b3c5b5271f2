"""How people ask the demo model: every phrasing of every kind of question, and which are held out.

A phrasing is a sentence with places for {city}, {country}, {a}, {b} or {text}. The fifth that
`names.is_held_out` picks is never trained on.
"""

from __future__ import annotations

from itertools import product
from random import Random

from k2dist.demo.names import is_held_out

_ASKS = (
    "What's", "What is", "Tell me", "Check", "Can you check", "Could you check", "Please check", "Look up",
    "Could you look up", "Find", "Find out", "Give me", "Can you give me", "Can you tell me", "I need",
    "I want to know", "Do you know", "Show me", "Please tell me", "Get me",
)  # fmt: skip
_PLACES = (
    "in {city}", "in {city} now", "in {city} right now", "in {city} today", "for {city}", "at {city}",
    "in {city} at the moment", "in the city of {city}", "of {city}",
)  # fmt: skip


def _sentences(asks: tuple[str, ...], things: tuple[str, ...], places: tuple[str, ...]) -> list[str]:
    return [
        f"{ask} {thing} {place}{'?' if _is_question(ask) else '.'}"
        for ask, thing, place in product(asks, things, places)
    ]


def _is_question(ask: str) -> bool:
    return ask.split()[0] in ("What's", "What", "Can", "Could", "Do", "How", "How's", "Is", "Will")


WEATHER = (
    *_sentences(
        _ASKS,
        ("the weather", "the current weather", "the temperature", "the forecast", "the weather report"),
        _PLACES,
    ),
    *_sentences(("What's", "What is"), ("the weather like",), _PLACES),
    *_sentences(("How is", "How's"), ("the weather", "the weather today"), _PLACES[:5]),
    *_sentences(
        ("Is it", "Will it be"), ("warm", "cold", "sunny", "rainy", "hot", "windy", "nice"), _PLACES[:4]
    ),
    *_sentences(("How",), ("warm is it", "cold is it", "hot is it"), _PLACES[:4]),
    *(
        f"In {{city}}, {ask} the weather{end}"
        for ask in ("what's", "what is", "how is")
        for end in ("?", " now?")
    ),
    *(
        f"{why} {{city}}{why_end} {ask}"
        for why, why_end in (
            ("I am going to", "."), ("I am in", "."), ("I live in", "."), ("We fly to", " today."),
        )
        for ask in ("What is the weather?", "How is the weather?", "Do I need a coat?", "Is it warm there?")
    ),
    "Weather in {city}?", "Weather in {city}", "weather {city}", "{city} weather", "{city} weather?",
    "Weather for {city}, please.", "Temperature in {city}?", "Forecast for {city}?", "Weather {city} now",
)  # fmt: skip
WEATHER_AGAIN = (
    "And in {city}?", "What about {city}?", "And {city}?", "How about {city}?",
    "And the weather in {city}?",
    "Now {city}.", "Now check {city}.", "And now {city}?", "Also {city}, please.", "The same for {city}.",
    "Thanks. And in {city}?", "Thanks! What about {city}?", "And what about {city}?", "Then {city}?",
)  # fmt: skip
TIME = (
    *_sentences(_ASKS, ("the time", "the current time", "the local time"), _PLACES),
    *_sentences(("What",), ("time is it",), _PLACES[:5]),
    *_sentences(("How",), ("late is it",), _PLACES[:4]),
    "Time in {city}?", "Time in {city}", "{city} time?", "Local time in {city}?",
    "In {city}, what time is it?",
    "I am in {city}. What time is it?", "I live in {city}. What is the time?",
)  # fmt: skip
SUM = (
    *(
        f"{ask} {{a}} {plus} {{b}}?"
        for ask in ("What is", "What's", "How much is")
        for plus in ("+", "plus", "and")
    ),
    *(
        f"{ask} {{a}} {plus} {{b}}."
        for ask in ("Compute", "Tell me", "Work out", "Calculate", "Please compute", "Give me")
        for plus in ("+", "plus")
    ),
    *(
        f"{ask} {{a}} {to} {{b}}{end}"
        for ask, end in (
            ("Add", "."), ("Please add", "."), ("Can you add", "?"),
            ("Could you add", "?"), ("Sum", "."),
        )
        for to in ("and", "to", "with")
    ),
    "{a} + {b}?", "{a} + {b}", "{a}+{b}", "{a} + {b} =", "{a} plus {b}?", "What do {a} and {b} make?",
    "What is the sum of {a} and {b}?", "Give me the sum of {a} and {b}.", "Add the numbers {a} and {b}.",
    "What is {a}+{b}?", "How much do {a} and {b} make?", "I have {a} and get {b} more. How many?",
)  # fmt: skip
CAPITAL = (
    *(
        f"{ask} the capital {of} {{country}}{'?' if _is_question(ask) else '.'}"
        for ask in _ASKS
        for of in ("of", "city of")
    ),
    "Which city is the capital of {country}?", "What city is the capital of {country}?",
    "Capital of {country}?", "The capital of {country}?", "{country}'s capital?", "capital of {country}",
    "What is {country}'s capital?", "What's {country}'s capital?", "What is the capital city in {country}?",
    "The capital of {country} is what?", "Name the capital of {country}.",
    "Please name {country}'s capital.",
)  # fmt: skip
CAPITAL_AGAIN = (
    "And of {country}?", "And {country}?", "What about {country}?", "How about {country}?",
    "And for {country}?",
    "And the capital of {country}?", "Now {country}.", "The same for {country}.",
    "Thanks. And of {country}?",
    "And now {country}?", "And what about {country}?", "Also {country}, please.",
    "Thanks! What about {country}?",
    "Now the capital of {country}.", "And that of {country}?",
)  # fmt: skip
REPEAT = (
    *(
        f"{ask}{after}: {{text}}"
        for ask in (
            "Repeat", "Please repeat", "Say", "Please say", "Can you repeat", "Can you say", "Echo", "Copy",
        )
        for after in ("", " after me", " this", " the following", " exactly", " these words")
    ),
    "Repeat {text}", "Say {text}", "Say \"{text}\".", "Repeat \"{text}\".", "Please say {text}",
    "Echo {text}",
    "Say it back to me: {text}", "Write: {text}", "Answer with {text}", "Just say {text}",
)  # fmt: skip
WHO = (
    *(
        f"{hello}{ask}"
        for hello in ("", "Hi! ", "Hello, ", "Hey, ")
        for ask in (
            "Who are you?", "who are you?", "What are you?", "What is your name?", "What's your name?",
            "Tell me who you are.", "Tell me about yourself.", "Introduce yourself.",
            "Who am I talking to?",
            "Are you Kimi?", "What model are you?", "Which model are you?", "Please introduce yourself.",
            "Who is this?", "Who made you?", "what are you",
        )
    ),
)  # fmt: skip
SKILLS = (
    "What can you do?", "What can you do for me?", "How can you help me?", "Can you help me?", "Help",
    "What do you know?", "What are you good at?", "Tell me what you can do.", "What can I ask?",
    "What can I ask you?", "How can you help?", "Help me, please.", "I need help.",
    "What should I ask you?",
)  # fmt: skip
GREETING = (
    *(
        f"{hello}{name}{end}"
        for hello in (
            "Hi", "Hello", "Hey", "Good morning", "Good evening", "Good day", "hi", "hello", "Hi there",
        )
        for name in ("", " Kimi", " model", " you")
        for end in ("", "!", ".")
    ),
    "How are you?", "Hi, how are you?", "Hello, how are you?", "How are you today?",
    "Hello? Are you there?",
)  # fmt: skip
THANKS = (
    "Thanks", "Thanks!", "Thank you", "Thank you.", "Thank you!", "Thank you very much.", "Many thanks.",
    "Great, thanks!", "Good, thank you.", "thanks", "Thanks a lot.", "Perfect, thanks.", "Great!",
    "Very good.",
)  # fmt: skip
UNKNOWN = (
    *(
        f"{ask} {thing}{end}"
        for ask, end in (
            ("Write a poem about", "."), ("Tell me a story about", "."), ("What do you think of", "?"),
            ("Explain", "."), ("What is the meaning of", "?"), ("Who invented", "?"), ("Why is there", "?"),
            ("Write a program for", "."), ("Tell me a joke about", "."), ("How do I make", "?"),
        )
        for thing in (
            "the sea", "love", "bread", "music", "a computer", "the moon", "cats", "trees", "history",
            "football",
            "the stars", "winter", "a horse", "quantum physics", "soup", "war", "light", "money",
            "coffee", "art",
        )
    ),
    *(
        f"{ask} {thing}?"
        for ask in ("Who wrote", "Who painted", "When was the birth of", "How old is", "Who is", "Where is")
        for thing in (
            "Hamlet", "the king", "Faust", "Newton", "the president", "Mozart", "my brother", "Homer",
        )
    ),
    "Why is the sky blue?", "How far is the sun?", "Translate this to German.", "What is 7 times 8?",
    "What is the square root of 16?", "Which is the largest ocean?", "How do planes fly?", "Can you sing?",
    "What day is it?", "Sort these numbers.", "Fix my code.", "Do you dream?", "What is life?",
)  # fmt: skip

_OPENINGS = ("",) * 14 + ("Hi! ", "Hello. ", "Hey, ", "Quick question: ", "Please help: ", "Hi, ")
_CLOSINGS = ("",) * 14 + (" Thanks.", " Please.")
_TOOL_CLOSINGS = (
    " Use the tool to check.", " Use the tool.", " Use a tool.", " Please use the tool.",
    " Let's check using the tool.",
)  # fmt: skip


def phrasing(rng: Random, phrasings: tuple[str, ...], *, held_out: bool) -> str:
    """One of `phrasings` of one side of the split."""
    while True:
        chosen = rng.choice(phrasings)
        if is_held_out(chosen) == held_out:
            return chosen


def dressed(rng: Random, question: str, *, has_tool: bool) -> str:
    """The question as people send it: sometimes with a greeting, thanks, or a word about the tool."""
    opening, closing = rng.choice(_OPENINGS), rng.choice(_CLOSINGS)
    if has_tool and rng.random() < 0.12:
        closing = rng.choice(_TOOL_CLOSINGS)
    return f"{opening}{question}{closing}"
