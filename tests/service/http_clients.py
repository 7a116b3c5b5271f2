"""What clients of a stream do: read its events, and put them together as strictly as its API says."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from k2dist.text.tokenizer import (
    CALL_ARGUMENTS,
    CALL_BEGIN,
    CALL_END,
    IM_END,
    SECTION_BEGIN,
    SECTION_END,
    Tokenizer,
)

Json = dict[str, Any]
HELLO = [{"role": "user", "content": "Hello"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@dataclass(frozen=True)
class SseEvent:
    data: str
    id: str | None = None
    event: str | None = None


def two_calls(tokenizer: Tokenizer, text: str = "I look.") -> list[int]:
    """Text, then two calls, the second with characters of two bytes."""
    parts: list[int] = list(text.encode())
    for mark in (SECTION_BEGIN,):
        parts.append(tokenizer.special_id(mark))
    for index, city in enumerate(("Rome", "Zürich")):
        parts.append(tokenizer.special_id(CALL_BEGIN))
        parts += f"functions.get_weather:{index}".encode()
        parts.append(tokenizer.special_id(CALL_ARGUMENTS))
        parts += f'{{"city": "{city}"}}'.encode()
        parts.append(tokenizer.special_id(CALL_END))
    return [*parts, tokenizer.special_id(SECTION_END), tokenizer.special_id(IM_END)]


async def read_sse(response: httpx.Response) -> AsyncIterator[SseEvent]:
    fields: dict[str, str] = {}
    async for line in response.aiter_lines():
        if line:
            name, _, value = line.partition(": ")
            if name:  # else a comment
                assert name not in fields, f"{name} twice in one event"
                fields[name] = value
        elif fields:
            yield SseEvent(**fields)
            fields = {}
    assert not fields, "an event was cut"


async def post_stream(
    http: httpx.AsyncClient, path: str, body: Json, last_id: str | None = None
) -> list[SseEvent]:
    headers = {} if last_id is None else {"Last-Event-ID": last_id}
    async with http.stream("POST", path, json=body | {"stream": True}, headers=headers) as response:
        assert response.status_code == 200, await response.aread()
        assert response.headers["content-type"].startswith("text/event-stream")
        return [event async for event in read_sse(response)]


def join_openai(events: Iterable[SseEvent]) -> Json:
    """The whole response that the chunks stand for; nothing may come twice or after its end."""
    *chunks, done = [event.data for event in events]
    assert done == "[DONE]"
    whole: Json = {"usage": None}
    choices: dict[int, Json] = {}
    for chunk in map(json.loads, chunks):
        head = {name: chunk[name] for name in ("id", "model", "created", "object")}
        assert all(whole.setdefault(name, value) == value for name, value in head.items())
        if chunk.get("usage") is not None:
            assert whole["usage"] is None
            assert chunk["choices"] == []
            whole["usage"] = chunk["usage"]
        for piece in chunk["choices"]:
            _join_choice(choices.setdefault(piece["index"], {"finish_reason": None, "logprobs": None}), piece)
    is_chat = whole["object"] == "chat.completion.chunk"
    whole["object"] = "chat.completion" if is_chat else "text_completion"
    for choice in choices.values():
        if is_chat:
            choice["message"]["content"] = choice["message"]["content"] or (
                None if choice["message"].get("tool_calls") else ""
            )
    whole["choices"] = [choices[index] | {"index": index} for index in sorted(choices)]
    return whole


def _join_choice(choice: Json, piece: Json) -> None:
    assert choice["finish_reason"] is None, "more after the end"
    choice["finish_reason"] = piece["finish_reason"]
    if "text" in piece:
        choice["text"] = choice.get("text", "") + piece["text"]
    else:
        _join_message(choice.setdefault("message", {}), piece["delta"])
    if piece["logprobs"] is not None:
        whole = choice["logprobs"] or {}
        for name, entries in piece["logprobs"].items():
            whole[name] = entries if entries is None else [*whole.get(name, []), *entries]
        choice["logprobs"] = whole


def _join_message(message: Json, delta: Json) -> None:
    if "role" in delta:
        assert message == {}, "a second beginning"
        message["role"] = delta["role"]
    assert "role" in message, "no beginning"
    if "content" in delta:
        message["content"] = message.get("content", "") + delta["content"]
    for more in delta.get("tool_calls", ()):
        calls = message.setdefault("tool_calls", [])
        if "id" in more:
            assert more["index"] == len(calls), "calls begin in order, once"
            function = {"name": more["function"]["name"], "arguments": ""}
            calls.append({"id": more["id"], "type": "function", "function": function})
        calls[more["index"]]["function"]["arguments"] += more["function"]["arguments"]


def join_anthropic(events: Iterable[SseEvent]) -> Json:
    """The whole message; asserts the exact order of events."""
    message: Json = {}
    block: Json | None = None
    arguments = ""
    has_stopped = False
    for event in events:
        data = json.loads(event.data)
        assert event.event == data["type"]
        assert not has_stopped, "more after the end"
        match data["type"]:
            case "message_start":
                assert message == {}
                message = data["message"]
            case "content_block_start":
                assert block is None
                assert data["index"] == len(message["content"])
                block, arguments = data["content_block"], ""
            case "content_block_delta":
                assert block is not None
                assert data["index"] == len(message["content"])
                arguments += _join_block(block, data["delta"])
            case "content_block_stop":
                assert block is not None
                assert data["index"] == len(message["content"])
                if block["type"] == "tool_use":
                    block["input"] = json.loads(arguments)
                message["content"].append(block)
                block = None
            case "message_delta":
                assert block is None
                assert message["stop_reason"] is None
                message |= data["delta"] | {"usage": data["usage"]}
            case "message_stop":
                assert message["stop_reason"] is not None
                has_stopped = True
            case kind:
                assert kind == "ping"
    assert has_stopped
    return message


def _join_block(block: Json, delta: Mapping[str, str]) -> str:
    """What the delta adds to a call's arguments."""
    if delta["type"] == "text_delta":
        block["text"] += delta["text"]
        return ""
    assert (block["type"], delta["type"]) == ("tool_use", "input_json_delta")
    return delta["partial_json"]
