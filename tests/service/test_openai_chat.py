"""Chat completions with the official client: every stream is the whole response, cut."""

from __future__ import annotations

import json
import string
from typing import Any

import httpx
import openai
import pytest

from k2dist.text.tokenizer import Tokenizer
from tests.service.fake_lane import FakeLane
from tests.service.http_clients import HELLO, WEATHER, join_openai, post_stream, two_calls
from tests.service.http_server import ServeHttp

BODIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "outputs": {"n": 3},
    "cut": {"max_tokens": 4, "n": 2},
    "stop": {"stop": ["mno", "gh"]},
    "logprobs": {"logprobs": True, "top_logprobs": 2, "max_completion_tokens": 5},
    "sampled token only": {"logprobs": True, "stop": "f"},
    "everything": {
        "temperature": 0.7,
        "top_p": 0.9,
        "presence_penalty": 0.1,
        "frequency_penalty": -0.1,
        "logit_bias": {"97": 1},
        "seed": 2**64 - 1,
        "top_k": 5,
        "min_p": 0.01,
        "user": "u",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "response_format": {"type": "text"},
        "parallel_tool_calls": True,
    },
}


@pytest.mark.parametrize("more", BODIES.values(), ids=BODIES.keys())
async def test_a_stream_is_the_whole_response_in_pieces(
    serve_http: ServeHttp, tokenizer: Tokenizer, more: dict[str, Any]
) -> None:
    body = {"model": "tiny", "messages": HELLO} | more
    async with serve_http(FakeLane(tokenizer, step_s=0.001)) as server:
        whole = (await server.http.post("/v1/chat/completions", json=body)).json()
        streamed = body | {"stream_options": {"include_usage": True}}
        joined = join_openai(await post_stream(server.http, "/v1/chat/completions", streamed))
    for response in (whole, joined):
        assert response.pop("id").startswith("chatcmpl-")
        response.pop("created")
        response["usage"].pop("prompt_tokens_details")  # the second finds the first one's pages
        for choice in response["choices"]:
            choice.pop("usage", None)
    assert joined == whole


async def test_the_official_client_reads_both_forms(serve_http: ServeHttp, tokenizer: Tokenizer) -> None:
    async with serve_http(FakeLane(tokenizer, step_s=0.001)) as server:
        chat = server.openai.chat.completions
        whole = await chat.create(model="tiny", messages=HELLO)  # type: ignore[arg-type]
        stream = await chat.create(
            model="tiny",
            messages=HELLO,  # type: ignore[arg-type]
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
        models = await server.openai.models.list()
        assert (await server.openai.models.retrieve("tiny")).id == "tiny"
        with pytest.raises(openai.NotFoundError):
            await server.openai.models.retrieve("other")
    assert whole.choices[0].message.content == string.ascii_lowercase
    assert whole.choices[0].finish_reason == "stop"
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 27
    assert len(chunks) > 10, "streamed, not gathered"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == string.ascii_lowercase
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 27
    assert chunks[-1].usage.prompt_tokens_details is not None
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens == 80, "pages of the first request"
    assert [model.id for model in models.data] == ["tiny"]


async def test_tool_calls_come_whole_and_streamed(serve_http: ServeHttp, tokenizer: Tokenizer) -> None:
    answer = two_calls(tokenizer)
    body = {"model": "tiny", "messages": HELLO, "tools": [WEATHER]}
    async with serve_http(FakeLane(tokenizer, script=lambda prompt: answer, step_s=0.001)) as server:
        whole = (await server.http.post("/v1/chat/completions", json=body)).json()
        joined = join_openai(await post_stream(server.http, "/v1/chat/completions", body))
    (choice,) = whole["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "I look."
    calls = choice["message"]["tool_calls"]
    assert [call["id"] for call in calls] == ["functions.get_weather:0", "functions.get_weather:1"]
    assert [json.loads(call["function"]["arguments"])["city"] for call in calls] == ["Rome", "Zürich"]
    assert joined["choices"][0]["message"] == choice["message"]
    assert joined["choices"][0]["finish_reason"] == "tool_calls"


async def test_a_tool_loop_hands_back_what_it_was_given(serve_http: ServeHttp, tokenizer: Tokenizer) -> None:
    """The message goes back as the client holds it, with all its empty fields; then a text answers."""
    answers = [two_calls(tokenizer), [*b"Done.", 258]]
    async with serve_http(
        FakeLane(tokenizer, script=lambda prompt: answers[b"Return" in bytes_of(prompt)])
    ) as server:
        messages: list[Any] = [{"role": "system", "content": "Be brief."}, *HELLO]
        chat = server.openai.chat.completions
        first = await chat.create(
            model="tiny",
            messages=messages,
            tools=[WEATHER],
            tool_choice="auto",
            temperature=0.6,  # type: ignore[list-item]
        )
        messages.append(first.choices[0].message)
        for call in first.choices[0].message.tool_calls or ():
            messages.append({"role": "tool", "tool_call_id": call.id, "name": "get_weather", "content": "21"})
        messages[-1]["content"] = [{"type": "text", "text": "2"}, {"type": "text", "text": "1"}]
        second = await chat.create(model="tiny", messages=messages, tools=[WEATHER])  # type: ignore[list-item]
    assert second.choices[0].message.content == "Done."
    assert second.choices[0].finish_reason == "stop"


def bytes_of(prompt: tuple[int, ...]) -> bytes:
    return bytes(token for token in prompt if token < 256)


async def test_without_a_choice_of_tools_there_are_no_calls(
    serve_http: ServeHttp, tokenizer: Tokenizer
) -> None:
    """The model is not shown them, and what it writes is text."""
    seen: list[bytes] = []

    def answer(prompt: tuple[int, ...]) -> list[int]:
        seen.append(bytes_of(prompt))
        return [*b"No.", 258]

    async with serve_http(FakeLane(tokenizer, script=answer)) as server:
        response = await server.openai.chat.completions.create(
            model="tiny",
            messages=HELLO,
            tools=[WEATHER],
            tool_choice="none",  # type: ignore[arg-type, list-item]
        )
    assert response.choices[0].message.content == "No."
    assert b"get_weather" not in seen[0]


async def test_a_partial_message_is_gone_on_with(serve_http: ServeHttp, tokenizer: Tokenizer) -> None:
    """The prompt ends in the message's text: after "...lm" comes "n"."""
    begun = [*HELLO, {"role": "assistant", "content": "klm", "partial": True}]
    async with serve_http(FakeLane(tokenizer)) as server:
        response = await server.http.post("/v1/chat/completions", json={"messages": begun})
        ended = await server.http.post(
            "/v1/chat/completions", json={"messages": [*HELLO, {"role": "assistant", "content": "klm"}]}
        )
    assert response.json()["choices"][0]["message"]["content"] == "nopqrstuvwxyz"
    assert ended.json()["choices"][0]["message"]["content"] == string.ascii_lowercase


async def test_the_temperature_left_open_is_the_models(serve_http: ServeHttp, tokenizer: Tokenizer) -> None:
    lane = FakeLane(tokenizer)
    seen: list[float] = []
    admit = lane._admit

    def note(request: Any) -> Any:
        seen.append(request.sampling.temperature)
        return admit(request)

    lane._admit = note  # type: ignore[method-assign]
    async with serve_http(lane) as server:
        for more in ({}, {"temperature": 0}, {"temperature": 1.5}):
            body = {"messages": HELLO, "max_tokens": 1} | more
            assert (await server.http.post("/v1/chat/completions", json=body)).status_code == 200
        body = {"messages": HELLO, "max_tokens": 1, "temperature": 0.5}
        assert (await server.http.post("/v1/messages", json=body)).status_code == 200
    assert seen == [0.25, 0.0, 1.5, 0.3]


IMAGE = {"type": "image_url", "image_url": {"url": "x"}}
OTHER_TOOL = {"type": "function", "function": {"name": "x"}}
REFUSALS = [
    ({"messages": []}, 400, "messages"),
    ({"messages": [{"role": "robot", "content": ""}]}, 400, "messages[0].role"),
    ({"messages": [{"role": "user", "content": [IMAGE]}]}, 400, "messages[0].content[0]"),
    ({"messages": [{"role": "tool", "content": "1"}]}, 400, "messages[0].tool_call_id"),
    ({"messages": [{"role": "user", "content": "a", "partial": True}]}, 400, "messages[0].partial"),
    ({"messages": [{"role": "user", "content": "a", "colour": "red"}]}, 400, "messages[0].colour"),
    ({"model": "gpt-4o"}, 404, "model"),
    ({"temperature": "hot"}, 400, "temperature"),
    ({"temperature": 1000}, 400, "temperature"),
    ({"top_p": 0}, 400, "top_p"),
    ({"n": 0}, 400, "n"),
    ({"n": 1000}, 400, "n"),
    ({"n": 2**40}, 400, "n"),
    ({"max_tokens": 0}, 400, "max_tokens"),
    ({"max_tokens": 5000}, 400, "max_tokens"),
    ({"max_tokens": 1, "max_completion_tokens": 2}, 400, "max_tokens"),
    ({"seed": -1}, 400, "seed"),
    ({"seed": 2**64}, 400, "seed"),
    ({"logit_bias": {"97": 101}}, 400, "logit_bias[97]"),
    ({"logit_bias": {"a": 1}}, 400, "logit_bias"),
    ({"logit_bias": {"600": 1}}, 400, "logit_bias"),
    ({"top_logprobs": 2}, 400, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, 400, "logprobs"),
    ({"stop": ""}, 400, "stop[0]"),
    ({"stream_options": {"include_usage": True}}, 400, "stream_options"),
    ({"tools": [{"type": "web_search"}]}, 400, "tools[0]"),
    ({"tools": [{"type": "function", "function": {"parameters": {}}}]}, 400, "tools[0].function.name"),
    ({"tool_choice": "required"}, 400, "tool_choice"),
    ({"tools": [WEATHER], "tool_choice": OTHER_TOOL}, 400, "tool_choice"),
    ({"functions": []}, 400, "functions"),
    ({"reasoning_effort": "high"}, 400, "reasoning_effort"),
    ({"audio": {}}, 400, "audio"),
    ({"modalities": ["text", "audio"]}, 400, "modalities[1]"),
    ({"no_such_field": 1}, 400, "no_such_field"),
    ({"response_format": {"type": "xml"}}, 400, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, 400, "response_format.json_schema"),
]  # fmt: skip


async def test_what_cannot_be_done_is_refused_by_name(serve_http: ServeHttp, tokenizer: Tokenizer) -> None:
    async with serve_http(FakeLane(tokenizer)) as server:
        for more, status, param in REFUSALS:
            body = {"model": "tiny", "messages": HELLO} | more
            for streamed in ({}, {"stream": True}) if "stream_options" not in more else ({},):
                response = await server.http.post("/v1/chat/completions", json=body | streamed)
                assert response.status_code == status, (more, response.text)
                error = response.json()["error"]
                assert error["param"] == param, (more, error)
                assert error["type"] == "invalid_request_error"
                assert error["message"].startswith(param), error
        with pytest.raises(openai.BadRequestError) as caught:
            await server.openai.chat.completions.create(model="tiny", messages=HELLO, top_p=0)  # type: ignore[arg-type]
    assert caught.value.param == "top_p"


UNENFORCEABLE = {
    "not": {"type": "object", "properties": {"a": {"not": {"type": "null"}}}},
    "if": {"type": "object", "if": {}, "then": {}},
    "uniqueItems": {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}},
    "contains": {"type": "object", "properties": {"a": {"type": "array", "contains": {"const": 1}}}},
}


@pytest.mark.parametrize("keyword", UNENFORCEABLE)
async def test_a_schema_that_cannot_be_kept_is_refused_by_its_keyword_and_fine_for_a_tool_that_is_not_strict(
    keyword: str, serve_http: ServeHttp, tokenizer: Tokenizer
) -> None:
    schema = UNENFORCEABLE[keyword]
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    function = {"name": "f", "parameters": schema}
    async with serve_http(FakeLane(tokenizer)) as server:

        async def post(more: dict[str, Any]) -> httpx.Response:
            return await server.http.post(
                "/v1/chat/completions", json={"messages": HELLO, "max_tokens": 2} | more
            )

        for more in (
            {"response_format": form},
            {"tools": [{"type": "function", "function": function}]},
            {"tools": [{"type": "function", "function": function | {"strict": True}}]},
        ):
            refused = await post(more)
            assert refused.status_code == 400
            assert keyword in refused.json()["error"]["message"]
        loose = {"tools": [{"type": "function", "function": function | {"strict": False}}]}
        assert (await post(loose)).status_code == 200
        assert (await post(loose | {"tool_choice": "required"})).status_code == 200
