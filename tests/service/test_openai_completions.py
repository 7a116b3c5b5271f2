"""Completions: prompts as text and ids, several at once, echo, logprobs of the prompt and of the answer."""

from __future__ import annotations

from typing import Any

import pytest

from k2dist.text.tokenizer import Tokenizer
from tests.service.fake_lane import FakeLane
from tests.service.http_clients import join_openai, post_stream
from tests.service.http_server import ServeHttp

BODIES: dict[str, dict[str, Any]] = {
    "text": {"prompt": "a"},
    "ids": {"prompt": [97, 98]},
    "several": {"prompt": ["a", "k"], "n": 2},
    "several of ids": {"prompt": [[97], [98, 99]], "echo": True},
    "echo": {"prompt": "né", "echo": True},
    "logprobs": {"prompt": "a", "logprobs": 2},
    "stop": {"prompt": "a", "stop": "ef", "max_tokens": 50},
    "scored prompts": {"prompt": ["né", "b", "xyz"], "echo": True, "logprobs": 1, "n": 2},
}


@pytest.mark.parametrize("more", BODIES.values(), ids=BODIES.keys())
async def test_a_stream_is_the_whole_response_in_pieces(
    serve_http: ServeHttp, tokenizer: Tokenizer, more: dict[str, Any]
) -> None:
    body = {"model": "tiny", "max_tokens": 6, "seed": 1} | more
    lanes = (FakeLane(tokenizer, lane=0, step_s=0.001), FakeLane(tokenizer, lane=1, step_s=0.001))
    async with serve_http(*lanes) as server:
        whole = (await server.http.post("/v1/completions", json=body)).json()
        streamed = body | {"stream_options": {"include_usage": True}}
        joined = join_openai(await post_stream(server.http, "/v1/completions", streamed))
    for response in (whole, joined):
        assert response.pop("id").startswith("cmpl-")
        response.pop("created")
        response["usage"].pop("prompt_tokens_details")
        for choice in response["choices"]:
            choice.pop("usage", None)
    assert joined == whole


async def test_the_official_client_reads_completions(serve_http: ServeHttp, tokenizer: Tokenizer) -> None:
    async with serve_http(FakeLane(tokenizer)) as server:
        whole = await server.openai.completions.create(model="tiny", prompt=["a", "x"], max_tokens=3)
        stream = await server.openai.completions.create(model="tiny", prompt="a", max_tokens=3, stream=True)
        text = "".join([chunk.choices[0].text async for chunk in stream])
    assert [choice.text for choice in whole.choices] == ["bcd", "yz"]
    assert [choice.finish_reason for choice in whole.choices] == ["length", "stop"]
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (2, 6)
    assert text == "bcd"


async def test_sixteen_tokens_are_the_default(serve_http: ServeHttp, tokenizer: Tokenizer) -> None:
    async with serve_http(FakeLane(tokenizer)) as server:
        response = await server.http.post("/v1/completions", json={"prompt": "a"})
    assert response.json()["choices"][0]["text"] == "bcdefghijklmnopq"


async def test_an_echo_scores_every_token_but_the_first(serve_http: ServeHttp, tokenizer: Tokenizer) -> None:
    """Offsets count characters; a token that is part of one is spelled by its bytes."""
    body = {"prompt": "né", "echo": True, "logprobs": 0, "max_tokens": 1}
    async with serve_http(FakeLane(tokenizer)) as server:
        (choice,) = (await server.http.post("/v1/completions", json=body)).json()["choices"]
    assert choice["text"] == "né�"
    assert choice["logprobs"] == {
        "tokens": ["n", "bytes:\\xc3", "bytes:\\xa9", "bytes:\\xaa"],
        "token_logprobs": [None, -1.0 - 0xC3 / 100, -1.0 - 0xA9 / 100, -0.5],
        "top_logprobs": [
            None,
            {"bytes:\\xc3": -1.0 - 0xC3 / 100},
            {"bytes:\\xa9": -1.0 - 0xA9 / 100},
            {"bytes:\\xaa": -0.5},
        ],
        "text_offset": [0, 1, 2, 2],
    }


async def test_what_cannot_be_done_is_refused_by_name(serve_http: ServeHttp, tokenizer: Tokenizer) -> None:
    refusals: list[tuple[dict[str, Any], str]] = [
        ({"prompt": []}, "n"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [97, "a"]}, "prompt[0]"),
        ({"prompt": [600]}, "prompt[0]"),
        ({"prompt": [-1]}, "prompt[0]"),
        ({"prompt": ["a"] * 65, "n": 2}, "n"),
        ({"prompt": "a", "best_of": 2}, "best_of"),
        ({"prompt": "a", "suffix": "z"}, "suffix"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
        ({"prompt": "a", "echo": True, "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "messages": []}, "messages"),
        ({}, "prompt"),
    ]
    async with serve_http(FakeLane(tokenizer)) as server:
        for body, param in refusals:
            response = await server.http.post("/v1/completions", json=body)
            assert response.status_code == 400, (body, response.text)
            assert response.json()["error"]["param"] == param, (body, response.text)
