"""Messages with the official client: the order of events, tools, what an answer ends with, errors."""

from __future__ import annotations

import json
import string
from typing import Any

import anthropic
import pytest

from k2dist.service.anthropic_requests import read_messages_body
from k2dist.text.tokenizer import Tokenizer
from tests.service.fake_lane import FakeLane
from tests.service.http_clients import HELLO, join_anthropic, post_stream, two_calls
from tests.service.http_server import ServeHttp

TOOL: dict[str, Any] = {
    "name": "get_weather",
    "description": "Get the weather",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}
BODY: dict[str, Any] = {"model": "tiny", "max_tokens": 100, "messages": HELLO}


def calls(*ids: str) -> dict[str, Any]:
    """A message of the assistant."""
    blocks = [{"type": "tool_use", "id": name, "name": "get_weather", "input": {}} for name in ids]
    return {"role": "assistant", "content": blocks}


def results(*ids: str) -> dict[str, Any]:
    return {
        "role": "user",
        "content": [{"type": "tool_result", "tool_use_id": name, "content": "21"} for name in ids],
    }


CALLS = calls("a")
WITH_IMAGE = {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "image"}]}
IMAGE = "messages[0].content[0]: image: not read here; this model takes text and tools only"
IMAGE_IN_RESULT = "messages[1].content[0].content[0]: image: not read here"
CLEAR_TOOLS = {"type": "clear_tool_uses_20250919"}


@pytest.mark.parametrize("text", ["I look.", ""])
async def test_the_order_of_events_is_exact(serve_http: ServeHttp, tokenizer: Tokenizer, text: str) -> None:
    answer = two_calls(tokenizer, text)
    body = BODY | {"tools": [TOOL]}
    async with serve_http(FakeLane(tokenizer, script=lambda prompt: answer, step_s=0.001)) as server:
        events = await post_stream(server.http, "/v1/messages", body)
        whole = (await server.http.post("/v1/messages", json=body)).json()
    kinds = [event.event for event in events]
    shown = [kind for kind, before in zip(kinds, [None, *kinds], strict=False) if kind != before]
    block = ["content_block_start", "content_block_delta", "content_block_stop"]
    first = ["content_block_start", "ping", *block[1:]]
    blocks = (first + block + block) if text else (first + block)
    assert shown == ["message_start", *blocks, "message_delta", "message_stop"]
    joined = join_anthropic(events)
    assert [part["type"] for part in joined["content"]] == ["text"] * bool(text) + ["tool_use"] * 2
    assert joined["stop_reason"] == "tool_use"
    assert joined["content"][-1]["input"] == {"city": "Zürich"}
    for message in (joined, whole):
        message.pop("id")
        message.pop("usage")
    assert joined == whole


@pytest.mark.parametrize(
    ("more", "text", "reason", "sequence"),
    [
        ({}, string.ascii_lowercase, "end_turn", None),
        ({"max_tokens": 3}, "abc", "max_tokens", None),
        ({"stop_sequences": ["mn", "gh"]}, "abcdef", "stop_sequence", "gh"),
        ({"system": "Be brief.", "metadata": {"user_id": "u"}}, string.ascii_lowercase, "end_turn", None),
        (
            {"thinking": {"type": "disabled"}, "service_tier": "auto"},
            string.ascii_lowercase,
            "end_turn",
            None,
        ),
    ],
)
async def test_streamed_and_whole_say_how_it_ended(
    serve_http: ServeHttp, tokenizer: Tokenizer, more: Any, text: str, reason: str, sequence: str | None
) -> None:
    async with serve_http(FakeLane(tokenizer, step_s=0.001)) as server:
        whole = await server.anthropic.messages.create(**(BODY | more))
        joined = join_anthropic(await post_stream(server.http, "/v1/messages", BODY | more))
    assert [block.text for block in whole.content] == [text]
    assert (whole.stop_reason, whole.stop_sequence) == (reason, sequence)
    assert joined["content"] == [{"type": "text", "text": text}]
    assert (joined["stop_reason"], joined["stop_sequence"]) == (reason, sequence)
    usage = joined["usage"]
    assert usage["output_tokens"] == whole.usage.output_tokens
    assert usage["cache_read_input_tokens"] > 0, "the first one's pages"
    assert whole.usage.cache_read_input_tokens == 0
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == whole.usage.input_tokens


async def test_the_official_tool_loop(serve_http: ServeHttp, tokenizer: Tokenizer) -> None:
    """Streamed, its content handed back as it came, results as blocks, until it stops by itself."""
    prompts: list[bytes] = []

    def answer(prompt: tuple[int, ...]) -> list[int]:
        prompts.append(bytes(token for token in prompt if token < 256))
        return [*b"Done.", 258] if b"## Return" in prompts[-1] else two_calls(tokenizer)

    messages: list[Any] = [*HELLO]
    async with serve_http(FakeLane(tokenizer, script=answer)) as server:
        for _ in range(2):
            arguments = BODY | {"messages": messages, "tools": [TOOL], "tool_choice": {"type": "auto"}}
            async with server.anthropic.messages.stream(**arguments) as stream:
                final = await stream.get_final_message()
            messages.append({"role": "assistant", "content": final.content})
            if final.stop_reason != "tool_use":
                break
            results = [
                {"type": "tool_result", "tool_use_id": block.id, "content": f"{block.input['city']}: 21"}
                for block in final.content
                if block.type == "tool_use"
            ]
            messages.append({"role": "user", "content": results})
    assert final.content[0].text == "Done."
    assert final.stop_reason == "end_turn"
    shown = prompts[-1].decode()
    assert 'functions.get_weather:1{"city": "Zürich"}' in shown
    assert "## Return of functions.get_weather:0\nRome: 21" in shown
    assert "## Return of functions.get_weather:1\nZürich: 21" in shown


async def test_a_last_message_of_the_assistant_is_gone_on_with(
    serve_http: ServeHttp, tokenizer: Tokenizer
) -> None:
    begun: list[Any] = [*HELLO, {"role": "assistant", "content": [{"type": "text", "text": "wx"}]}]
    async with serve_http(FakeLane(tokenizer)) as server:
        message = await server.anthropic.messages.create(**(BODY | {"messages": begun}))
    assert [block.text for block in message.content] == ["yz"]


async def test_counted_tokens_are_those_of_the_prompt(serve_http: ServeHttp, tokenizer: Tokenizer) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": HELLO, "system": "Be brief.", "tools": [TOOL]}
    async with serve_http(FakeLane(tokenizer)) as server:
        counted = await server.anthropic.messages.count_tokens(**asked)
        message = await server.anthropic.messages.create(**(BODY | asked))
    assert counted.input_tokens == message.usage.input_tokens > 0


@pytest.mark.parametrize(
    ("messages", "place"),
    [
        ([*HELLO, calls("a", "b"), results("b", "a")], None),
        ([*HELLO, calls("a"), calls("b"), results("b"), results("a")], None),
        ([*HELLO, calls("a"), *HELLO, results("a")], None),
        ([results("a")], "messages[0].content[0].tool_use_id: 'a'"),
        ([*HELLO, calls("a"), results("a", "b")], "messages[2].content[1].tool_use_id: 'b'"),
        ([*HELLO, calls("a"), results("a", "a")], "messages[2].content[1].tool_use_id: 'a'"),
        ([*HELLO, calls("a"), results("a"), calls("b"), results("a")], "messages[4].content[0].tool_use_id"),
    ],
)
async def test_a_result_answers_a_call_of_the_turn_before_it_once(
    serve_http: ServeHttp, tokenizer: Tokenizer, messages: Any, place: str | None
) -> None:
    async with serve_http(FakeLane(tokenizer)) as server:
        body = BODY | {"messages": messages, "tools": [TOOL]}
        response = await server.http.post("/v1/messages", json=body)
        counted = await server.http.post("/v1/messages/count_tokens", json=body | {"max_tokens": None})
    assert response.status_code == counted.status_code == (200 if place is None else 400), response.text
    if place is not None:
        assert response.json()["error"]["message"].startswith(place)


async def test_a_request_as_coding_agents_send_it(serve_http: ServeHttp, tokenizer: Tokenizer) -> None:
    """Over the beta resource: system in cached blocks, tools, a thinking budget, edits of thoughts."""
    cached = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
    tools: list[Any] = [TOOL | {"name": f"tool_{n}"} | (cached if n == 2 else {}) for n in range(3)]
    thought = {"type": "thinking", "thinking": "hm", "signature": "s"}
    asked: dict[str, Any] = BODY | {
        "system": [
            {"type": "text", "text": "You are an agent."} | cached,
            {"type": "text", "text": "Be brief."},
        ],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Hello"} | cached]},
            {
                "role": "assistant",
                "content": [thought, {"type": "redacted_thinking", "data": "x"}, *calls("a")["content"]],
            },
            {"role": "user", "content": [results("a")["content"][0] | cached | {"is_error": True}]},
        ],
        "tools": tools,
        "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
        "thinking": {"type": "enabled", "budget_tokens": 1024},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "metadata": {"user_id": "u"},
        "betas": ["claude-code-20250219", "context-management-2025-06-27"],
    }
    plain = [tool | {"cache_control": None} for tool in tools]
    async with serve_http(FakeLane(tokenizer)) as server:
        whole = await server.anthropic.beta.messages.create(**asked)
        async with server.anthropic.beta.messages.stream(**asked) as stream:
            final = await stream.get_final_message()
        counted = await server.anthropic.messages.count_tokens(
            model="tiny", messages=asked["messages"], system="You are an agent.Be brief.", tools=plain
        )
    assert whole.stop_reason == final.stop_reason == "end_turn"
    assert [block.text for block in whole.content] == [block.text for block in final.content]
    for usage in (whole.usage, final.usage):
        assert usage.input_tokens + (usage.cache_read_input_tokens or 0) == counted.input_tokens


async def test_a_call_that_is_cut_is_the_same_streamed_and_whole(
    serve_http: ServeHttp, tokenizer: Tokenizer
) -> None:
    """Cut anywhere: what the official client reads of the stream is what the whole message says."""
    answer = two_calls(tokenizer, "")
    async with serve_http(FakeLane(tokenizer, script=lambda prompt: answer)) as server:
        for num_tokens in range(28, len(answer), 5):
            asked = BODY | {"tools": [TOOL], "max_tokens": num_tokens}
            whole = await server.anthropic.messages.create(**asked)
            async with server.anthropic.messages.stream(**asked) as stream:
                final = await stream.get_final_message()
            assert whole.stop_reason == final.stop_reason
            assert [block.to_dict() for block in whole.content] == [
                block.to_dict() for block in final.content
            ]


async def test_every_response_says_its_request_id(serve_http: ServeHttp, tokenizer: Tokenizer) -> None:
    async with serve_http(FakeLane(tokenizer)) as server:
        message = await server.anthropic.messages.create(**BODY)
        assert message._request_id == message.id
        completion = await server.openai.chat.completions.create(model="tiny", messages=HELLO)
        assert completion._request_id == completion.id
        with pytest.raises(anthropic.NotFoundError) as caught:
            await server.anthropic.messages.create(**(BODY | {"model": "claude"}))
        assert str(caught.value.request_id).startswith("msg_")
        assert caught.value.body["request_id"] == caught.value.request_id  # type: ignore[index]
        refused = await server.http.post("/v1/messages", content=b"{")
        assert refused.headers["request-id"] == refused.json()["request_id"]
        assert refused.headers["request-id"].startswith("req_")
        (served,) = (await server.anthropic.models.list()).data
        assert (served.type, served.id, served.display_name) == ("model", "tiny", "tiny")


@pytest.mark.parametrize(("asked", "used"), [(1.0, 0.6), (0.5, 0.3), (0.0, 0.0), (None, None)])
def test_the_temperature_is_scaled(asked: float | None, used: float | None) -> None:
    """Left out, it is the model's own, as for other clients."""
    sampling = read_messages_body(BODY | {"temperature": asked}, "msg_x").request.sampling
    assert sampling.temperature == pytest.approx(used)


async def test_what_cannot_be_done_is_refused_in_its_form(
    serve_http: ServeHttp, tokenizer: Tokenizer
) -> None:
    tool_result = {"type": "tool_result", "tool_use_id": "a", "content": "1"}
    refusals: list[tuple[dict[str, Any], int, str]] = [
        ({"messages": []}, 400, "messages"),
        ({"model": "claude"}, 404, "model"),
        ({"max_tokens": None}, 400, "max_tokens"),
        ({"max_tokens": 5000}, 400, "max_tokens"),
        ({"temperature": 1.5}, 400, "temperature"),
        ({"thinking": {"type": "much"}}, 400, "thinking.type"),
        ({"context_management": {"edits": [CLEAR_TOOLS]}}, 400, "context_management.edits[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, 400, IMAGE),
        ({"messages": [CALLS, {"role": "user", "content": [WITH_IMAGE]}]}, 400, IMAGE_IN_RESULT),
        ({"messages": [{"role": "assistant", "content": [tool_result]}]}, 400, "messages[0].content[0]"),
        ({"stop_sequences": [""]}, 400, "stop_sequences[0]"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, 400, "tools[0]"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "x"}}, 400, "tool_choice.name"),
        ({"mcp_servers": []}, 400, "mcp_servers"),
    ]
    async with serve_http(FakeLane(tokenizer)) as server:
        for more, status, field in refusals:
            response = await server.http.post("/v1/messages", json=BODY | more)
            assert response.status_code == status, (more, response.text)
            body = response.json()
            assert body["type"] == "error"
            kind = "not_found_error" if status == 404 else "invalid_request_error"
            assert body["error"]["type"] == kind
            assert body["error"]["message"].startswith(field), (more, body)
        with pytest.raises(anthropic.BadRequestError):
            await server.anthropic.messages.create(**(BODY | {"max_tokens": 5000}))
        assert json.loads((await server.http.get("/v1/messages")).text)["type"] == "error"
