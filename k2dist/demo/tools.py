"""The demo's three tools: how clients declare them, what they answer, and what the model makes of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from random import Random
from typing import Any

from k2dist.demo.names import is_held_out, listed, number, word

Tool = Mapping[str, Any]

_DESCRIPTIONS = {
    "get_weather": (
        "Get weather",
        "Get weather information. Call this tool when the user needs to get weather information",
        "Get the weather in a city.", "Get the current weather", "Current weather of a city",
    ),
    "get_time": ("Get the local time", "Get the time in a city.", "Current local time of a city",
    "Get time"),
    "add": ("Add two numbers", "Add two numbers.", "Sum of two numbers", "Add a and b"),
}  # fmt: skip
_CITY = {"type": "string"}
_CITY_DESCRIPTIONS = ("City name", "The city", "Name of the city")
_OTHERS = {
    "search": ("Search the web", "query"), "send_mail": ("Send a mail", "text"), "get_news": ("Get news",
    "topic"),
    "play_music": ("Play music", "title"), "translate": ("Translate text", "text"),
}  # fmt: skip
CONDITIONS = tuple(
    listed("""
sunny|cloudy|rainy|snowy|clear|windy|rain|snow|partly cloudy|drizzle|foggy|stormy
dry|heavy snow|fair|fine|bright|mild|cool|cold|hot|freezing|icy|showers|heavy rain|light snow|mostly sunny
partly sunny|thunderstorms
sleet|hail|mist|misty|breezy|dusty|chilly|gloomy|pleasant|clear sky|calm|muggy|blizzard|sandstorm|tropical
frosty|dull|grey|light wind|smoky|gentle breeze|changeable|unsettled|fog|storm|scorching|crisp|thunder|slush
very cold|hot and humid|light showers|freezing rain|dense fog|cold and wet|rain showers|patchy rain|tornado
blowing snow|typhoon|damp|heatwave|snowstorm|lightning|cloudless|blue sky|good|bad|lovely|wintry|few clouds
broken clouds
warm|mostly cloudy|wet|scattered clouds|gusty|clouds|showery|very hot|mostly clear|freezing fog|strong winds
high winds|sunny spells|hurricane|monsoon|downpour|drizzly|torrential rain|frost|haze|fresh|dreary
""")
)  # all in the last two lines are held out
_NUM_COMMON = 12  # those in the first line, which half of all answers say


def declaration(name: str, rng: Random | None = None) -> Tool:
    """The tool `name` as a client sends it; without `rng` in its plainest form."""
    description = _DESCRIPTIONS[name][0] if rng is None else rng.choice(_DESCRIPTIONS[name])
    if name == "add":
        kind = "number" if rng is None else rng.choice(("number", "number", "integer"))
        return _function(name, description, {"a": {"type": kind}, "b": {"type": kind}})
    city: dict[str, str] = dict(_CITY)
    if rng is not None and rng.random() < 0.4:
        city["description"] = rng.choice(_CITY_DESCRIPTIONS)
    return _function(name, description, {"city": city})


def other_tool(rng: Random) -> Tool:
    """A tool that no question of the corpus asks for."""
    name = rng.choice(tuple(_OTHERS))
    description, argument = _OTHERS[name]
    return _function(name, description, {argument: {"type": "string"}})


def _function(name: str, description: str, properties: Mapping[str, Any]) -> Tool:
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": parameters},
    }


def temperature(rng: Random, *, held_out: bool) -> str:
    """Degrees as they stand in JSON, of one side of the split: mostly whole, and in a range that weather has.

    The third from a wider range are there so that numbers are copied and not remembered.
    """
    if rng.random() < 0.85:
        low, high = (-30, 45) if rng.random() < 0.67 else (-99, 199)
        return str(number(rng, low, high, held_out=held_out))
    while True:
        text = f"{rng.uniform(-20, 40):.1f}"
        if is_held_out(text) == held_out:
            return text


def clock(rng: Random, *, held_out: bool) -> str:
    """A time of day, hours and minutes, of one side of the split."""
    while True:
        text = f"{rng.randrange(24):02d}:{rng.randrange(60):02d}"
        if is_held_out(text) == held_out:
            return text


def condition(rng: Random, *, held_out: bool, real_share: float) -> str:
    """A word for the weather, of one side of the split, real or made up, as tools write it: in any case."""
    is_real = rng.random() < real_share
    while True:
        listed_words = CONDITIONS[:_NUM_COMMON] if rng.random() < 0.5 else CONDITIONS
        text = rng.choice(listed_words) if is_real else word(rng, held_out=held_out)
        if is_held_out(text) == held_out:
            return rng.choices((text, text.capitalize(), text.title(), text.upper()), (50, 35, 12, 3))[0]


def weather_result(
    rng: Random, city: str, *, held_out: bool, real_share: float = 1.0
) -> tuple[str, str, str]:
    """A tool's answer with a temperature, its number, and the assistant's words about it."""
    degrees = temperature(rng, held_out=held_out)
    sky = condition(rng, held_out=held_out, real_share=real_share)
    if rng.random() < 0.2:
        body, has_condition = _weather_text(rng, city, degrees, sky)
    else:
        body, has_condition = _weather_json(rng, city, degrees, sky)
    words = f"It is {degrees} degrees and {sky}" if has_condition else f"It is {degrees} degrees"
    return body, degrees, f"{words} in {city}."


def word_result(rng: Random, city: str, *, held_out: bool, real_share: float = 1.0) -> tuple[str, str, str]:
    """As `weather_result`, of a tool that knows no temperature: the publisher's says {"weather": "Sunny"}."""
    sky = condition(rng, held_out=held_out, real_share=real_share)
    if rng.random() < 0.4:
        body = _word_text(rng, city, sky)
    else:
        keys = ("weather", "weather", "weather", "condition", "conditions", "sky", "forecast", "description")
        fields: list[tuple[str, object]] = [(rng.choice(keys), sky)]
        if rng.random() < 0.1:
            fields.append((rng.choice(("humidity", "wind_kmh", "wind")), rng.randint(0, 99)))
        if rng.random() < 0.4:
            fields.insert(0, (rng.choice(("city", "city", "location")), city))
        body = _json(rng, dict(fields))
    return body, sky, f"It is {sky} in {city}."


def _word_text(rng: Random, city: str, sky: str) -> str:
    texts = (
        sky, sky, sky, f"{sky}.", json.dumps(sky, ensure_ascii=False), f"It is {sky}.", f"{city}: {sky}",
        f"The weather in {city} is {sky}.",
    )  # fmt: skip
    return rng.choice(texts)


def _json(rng: Random, fields: dict[str, object]) -> str:
    """As clients send it: mostly `json.dumps`, also without spaces, and what Python's `str` makes of it."""
    kind = rng.random()
    if kind < 0.1:
        return str(fields)
    separators = (",", ":") if kind < 0.25 else (", ", ": ")
    return json.dumps(fields, ensure_ascii=False, separators=separators)


def _weather_text(rng: Random, city: str, degrees: str, sky: str) -> tuple[str, bool]:
    texts = (
        (degrees, False), (f"{degrees} degrees", False), (f"{degrees} C", False),
        (f"{degrees} degrees and {sky}", True), (f"{sky}, {degrees} C", True),
        (f"{degrees} C, {sky}", True), (f"{city}: {degrees} C, {sky}", True),
        (f"It is {degrees} degrees and {sky}.", True),
    )  # fmt: skip
    return rng.choice(texts)


def _weather_json(rng: Random, city: str, degrees: str, sky: str) -> tuple[str, bool]:
    value: object = float(degrees) if "." in degrees else int(degrees)
    fields: list[tuple[str, object]] = [
        (rng.choice(("temp", "temperature", "temperature_c", "temp_c", "degrees")), value)
    ]
    has_condition = rng.random() < 0.55
    if has_condition:
        fields.append((rng.choice(("condition", "weather", "sky")), sky))
    if rng.random() < 0.2:
        fields.append((rng.choice(("humidity", "wind_kmh", "wind")), rng.randint(0, 99)))
    if rng.random() < 0.3:
        rng.shuffle(fields)
    if rng.random() < 0.45:
        fields.insert(0, ("city", city))
    return _json(rng, dict(fields)), has_condition


def time_result(rng: Random, city: str, *, held_out: bool) -> tuple[str, str, str]:
    """As `weather_result`, for the time of day."""
    now = clock(rng, held_out=held_out)
    fields = {rng.choice(("time", "local_time", "now")): now}
    if rng.random() < 0.4:
        fields = {"city": city} | fields
    body = now if rng.random() < 0.2 else json.dumps(fields, ensure_ascii=False)
    return body, now, f"It is {now} in {city}."


def sum_result(rng: Random, a: int, b: int) -> tuple[str, str, str]:
    """As `weather_result`, for a sum."""
    total = a + b
    body = str(total) if rng.random() < 0.3 else json.dumps({rng.choice(("sum", "result", "total")): total})
    return body, str(total), f"{a} + {b} is {total}."
