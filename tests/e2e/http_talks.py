"""Conversations over HTTP, held as the publishers of clients and of the model show them."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import httpx
from openai import OpenAI

WEATHER = '{"weather": "Sunny"}'  # what the tool of Moonshot's example says
QUESTION = "What's the weather like in Beijing today? Use the tool to check."
SCHEMA = {
    "type": "object",
    "required": ["city"],
    "properties": {"city": {"type": "string", "description": "City name"}},
}
DESCRIPTION = "Get weather information. Call this tool when the user needs to get weather information"


def tool_call_with_client(
    client: OpenAI, model_name: str, *, seed: int, question: str = QUESTION, result: str = WEATHER
) -> tuple[str, list[Any]]:
    """The loop of Moonshot's tool calling guide: until the reason is no longer tool_calls.

    The answer, and the calls before it. But for the seed, by which a test is the same every time, it is as
    published.
    """
    function = {"name": "get_weather", "description": DESCRIPTION, "parameters": SCHEMA}
    tools: Any = [{"type": "function", "function": function}]
    messages: list[Any] = [
        {"role": "system", "content": "You are Kimi, an AI assistant created by Moonshot AI."},
        {"role": "user", "content": question},
    ]
    finish_reason = None
    called: list[Any] = []
    while finish_reason is None or finish_reason == "tool_calls":
        completion = client.chat.completions.create(
            model=model_name, messages=messages, temperature=0.6, tools=tools, tool_choice="auto", seed=seed
        )
        choice = completion.choices[0]
        finish_reason = choice.finish_reason
        if finish_reason == "tool_calls":
            messages.append(choice.message)
            for tool_call in choice.message.tool_calls or ():
                arguments = json.loads(tool_call.function.arguments)  # type: ignore[union-attr]
                called.append((tool_call.function.name, arguments))  # type: ignore[union-attr]
                messages.append(
                    {
                        "role": "tool",
                        "tool_call_id": tool_call.id,
                        "name": tool_call.function.name,  # type: ignore[union-attr]
                        "content": result,
                    }
                )
    return choice.message.content or "", called


def anthropic_tool_loop(client: anthropic.Anthropic, model: str) -> tuple[str, list[Any]]:
    """Streamed, greedy; until it stops for another reason than a tool."""
    tools: Any = [{"name": "get_weather", "description": DESCRIPTION, "input_schema": SCHEMA}]
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    called: list[Any] = []
    while True:
        with client.messages.stream(
            model=model, max_tokens=200, messages=messages, tools=tools, extra_body={"temperature": 0.0}
        ) as stream:
            text = "".join(stream.text_stream)
            final = stream.get_final_message()
        messages.append({"role": "assistant", "content": final.content})
        if final.stop_reason != "tool_use":
            return text, called
        results = []
        for block in final.content:
            if block.type == "tool_use":
                called.append((block.name, block.input))
                result = {"type": "tool_result", "tool_use_id": block.id, "content": WEATHER}
                results.append(result)
        messages.append({"role": "user", "content": results})


def read_chunks(url: str, body: dict[str, Any], last_id: str | None, at_most: int) -> list[tuple[str, str]]:
    """(id, data) of a stream's first events, then the connection is dropped."""
    seen: list[tuple[str, str]] = []
    headers = {} if last_id is None else {"Last-Event-ID": last_id}
    event_id = ""
    try:
        with httpx.stream("POST", url, json=body, headers=headers, timeout=60) as response:
            assert response.status_code == 200, response.read()
            for line in response.iter_lines():
                name, _, value = line.partition(": ")
                if name == "id":
                    event_id = value
                elif name == "data":
                    seen.append((event_id, value))
                    if len(seen) == at_most:
                        break
    except httpx.RemoteProtocolError:
        pass
    return seen


def text_of(chunks: list[tuple[str, str]]) -> str:
    pieces = [json.loads(data)["choices"][0]["delta"] for _, data in chunks if data != "[DONE]"]
    return "".join(piece.get("content", "") for piece in pieces)
