"""All schemas through the whole service: calls of noise, forced, streamed and in one, over gRPC and HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from k2dist.engine import LocalWorld
from k2dist.scheduler import Limits
from k2dist.service.answer_events import Accepted, AnswerEnd, Delta
from k2dist.service.client import AsyncClient
from k2dist.service.client_request import ClientRequest, PartialSampling
from k2dist.service.gateway_actor import GatewayActor
from k2dist.service.whole_answer import WholeAnswer
from k2dist.text.chat import Chat, ToolChoice
from k2dist.text.tokenizer import Tokenizer
from tests.grammar.conftest import CASES, Case, check_valid
from tests.grammar.noise_model import ending_sampling
from tests.grammar.test_service import USER, gather, open_service, service_config


class Server(NamedTuple):
    grpc: AsyncClient
    http: httpx.AsyncClient
    tokenizer: Tokenizer


class Outcome(NamedTuple):
    """One schema's call: whether the answer ended by itself, and in how many pieces it came."""

    has_ended: bool
    num_pieces: int


@asynccontextmanager
async def serve_both(model_dir: Path) -> AsyncIterator[Server]:
    config = service_config()
    gateway = GatewayActor(config)
    world = LocalWorld(
        model_dir,
        limits=Limits(step_tokens=2048, max_running=128, max_waiting=512, chunk_tokens=256),
        page_tokens=16,
        num_pages=8192,
    )
    with world:
        async with open_service(config, model_dir, world) as address, AsyncClient(address) as client:
            url = f"http://{await gateway.start(address, '127.0.0.1:0')}"
            try:
                async with httpx.AsyncClient(base_url=url, timeout=200) as http:
                    yield Server(client, http, Tokenizer.load(model_dir))
            finally:
                await gateway.stop()


async def streamed_call(
    server: Server, tool: dict[str, Any], said: dict[str, Any]
) -> tuple[WholeAnswer, int]:
    chat = Chat(messages=(USER,), tools=(tool,), tool_choice=ToolChoice(mode="named", name="f"))
    whole, events = await gather(server.grpc, ClientRequest(prompt=chat, sampling=PartialSampling(**said)))
    return whole, sum(isinstance(event, Delta) for event in events)


async def whole_call(server: Server, tool: dict[str, Any], said: dict[str, Any]) -> dict[str, Any]:
    body = {
        "model": "",
        "messages": [{"role": "user", "content": USER.content}],
        "tools": [tool],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        **said,
    }
    response = await server.http.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    (choice,) = response.json()["choices"]
    return dict(choice)


async def resumed(server: Server, whole: WholeAnswer) -> WholeAnswer:
    """The same answer once more, which comes in one event: it has ended."""
    assert isinstance(whole.accepted, Accepted)
    again = WholeAnswer()
    async for event in server.grpc.resume(whole.accepted.request_id):
        again.add(event)
    return again


async def call_one(server: Server, case: Case, seed: int) -> Outcome:
    """The three must be one answer, and a call that ended must be valid."""
    tool = {"type": "function", "function": {"name": "f", "parameters": case.schema}}
    said = ending_sampling(server.tokenizer, seed=seed)
    streamed, num_pieces = await streamed_call(server, tool, said)
    again = await resumed(server, streamed)
    whole = await whole_call(server, tool, said)
    assert (again.tool_calls, again.token_ids) == (streamed.tool_calls, streamed.token_ids), case.name
    calls = [
        (call["function"]["name"], call["function"]["arguments"])
        for call in whole["message"].get("tool_calls") or ()
    ]
    assert calls == [(call.name, call.arguments) for call in streamed.tool_calls], case.name
    assert not streamed.text
    assert streamed.finished is not None
    if streamed.finished.reason is AnswerEnd.LENGTH:
        assert whole["finish_reason"] == "length", case.name
        return Outcome(False, num_pieces)
    assert (streamed.finished.reason, whole["finish_reason"]) == (AnswerEnd.TOOL_CALLS, "tool_calls"), (
        case.name
    )
    ((name, arguments),) = calls
    assert name == "f"
    check_valid(str(arguments), case.schema)
    return Outcome(True, num_pieces)


def test_forced_calls_are_valid_streamed_and_not(noise_model_dir: Path) -> None:
    """Of a model with random weights, for each of the schemas. One that is cut says so."""

    async def all_of_them() -> list[Outcome]:
        async with serve_both(noise_model_dir) as server:
            return await asyncio.gather(*(call_one(server, case, seed) for seed, case in enumerate(CASES)))

    outcomes = asyncio.run(asyncio.wait_for(all_of_them(), 300))
    assert len(outcomes) >= 150
    assert sum(outcome.has_ended for outcome in outcomes) >= len(outcomes) * 140 / 150
    assert all(outcome.num_pieces > 3 for outcome in outcomes), "one that is not streamed shows nothing"
