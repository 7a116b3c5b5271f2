"""`Last-Event-ID` through the whole service: the same POST goes on where its stream broke off."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from k2dist.text.tokenizer import Tokenizer
from tests.service.fake_lane import FakeLane
from tests.service.http_clients import (
    HELLO,
    WEATHER,
    SseEvent,
    join_anthropic,
    join_openai,
    post_stream,
    read_sse,
    two_calls,
)
from tests.service.http_server import ServeHttp

TOOL = {"name": "get_weather", "input_schema": {"type": "object"}}
REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", {"messages": HELLO, "tools": [WEATHER], "n": 2}),
    "text": (
        "/v1/completions",
        {"prompt": ["né", "b"], "n": 2, "echo": True, "logprobs": 1, "max_tokens": 5},
    ),
    "messages": ("/v1/messages", {"messages": HELLO, "tools": [TOOL], "max_tokens": 100}),
}


def join(path: str, events: list[SseEvent]) -> dict[str, Any]:
    return join_anthropic(events) if path == "/v1/messages" else join_openai(events)


async def read_some(
    http: httpx.AsyncClient, path: str, body: dict[str, Any], num_events: int, last_id: str | None = None
) -> list[SseEvent]:
    """The first events; then the connection is dropped."""
    seen: list[SseEvent] = []
    headers = {} if last_id is None else {"Last-Event-ID": last_id}
    async with http.stream("POST", path, json=body | {"stream": True}, headers=headers) as response:
        assert response.status_code == 200, await response.aread()
        async for event in read_sse(response):
            seen.append(event)
            if len(seen) == num_events:
                break
    return seen


@pytest.mark.parametrize(("path", "body"), REQUESTS.values(), ids=REQUESTS.keys())
async def test_an_ended_stream_is_read_on_from_every_event(
    serve_http: ServeHttp, tokenizer: Tokenizer, path: str, body: dict[str, Any]
) -> None:
    lane = FakeLane(tokenizer, script=lambda prompt: two_calls(tokenizer))
    async with serve_http(lane) as server:
        events = await post_stream(server.http, path, body)
        whole = join(path, list(events))
        for num_seen in range(1, len(events), 1 + len(events) // 12):
            seen = events[:num_seen]
            rest = await post_stream(server.http, path, body, seen[-1].id)
            assert join(path, seen + rest) == whole


@pytest.mark.parametrize(("path", "body"), REQUESTS.values(), ids=REQUESTS.keys())
async def test_a_detached_stream_survives_every_loss_of_its_connection(
    serve_http: ServeHttp, tokenizer: Tokenizer, path: str, body: dict[str, Any]
) -> None:
    """Dropped again and again while it is generated; the lane never hears of it."""
    lane = FakeLane(tokenizer, script=lambda prompt: two_calls(tokenizer), step_s=0.005)
    body = body | {"detached": True}
    async with serve_http(lane) as server:
        seen: list[SseEvent] = []
        while not seen or seen[-1].id is not None:
            last_id = seen[-1].id if seen else None
            more = await read_some(server.http, path, body, 5, last_id)
            if not more:
                break
            seen += more
        join(path, seen)
    assert lane.cancelled == []


async def test_what_cannot_be_read_on_is_refused(serve_http: ServeHttp, tokenizer: Tokenizer) -> None:
    path, body = REQUESTS["chat"]
    async with serve_http(FakeLane(tokenizer, script=lambda prompt: two_calls(tokenizer))) as server:
        events = await post_stream(server.http, path, body)
        last_id = events[-2].id
        assert last_id is not None
        unknown = last_id.replace(last_id[17:33], "0" * 16)
        beyond = f"{last_id.partition(':')[0]}:0:100000:0"
        wrong: list[tuple[str, dict[str, Any], int]] = [
            ("garbage", {}, 400),
            (last_id + ";", {}, 400),
            (unknown, {}, 404),
            (beyond, {}, 400),
            (last_id, {"n": 1}, 400),  # another body
            (last_id, {"stream": False}, 400),
        ]
        for event_id, more, status in wrong:
            headers = {"Last-Event-ID": event_id}
            response = await server.http.post(path, json=body | {"stream": True} | more, headers=headers)
            assert response.status_code == status, (event_id, response.text)
            assert response.json()["error"]["type"] == "invalid_request_error"
        text_path, text_body = REQUESTS["text"]
        response = await server.http.post(
            text_path, json=text_body | {"stream": True}, headers={"Last-Event-ID": last_id}
        )
        assert response.status_code == 400, "an id of the other API"
