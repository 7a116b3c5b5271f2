"""Constraints over gRPC: a whole coordinator before a lane that computes, streamed and read in one."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from k2dist.config.cluster import CacheConfig, ClusterConfig, ParallelConfig, SchedulerConfig, ServiceConfig
from k2dist.engine import LocalWorld
from k2dist.messages import (
    ChatMessage,
    Choice,
    Constraint,
    JsonObject,
    JsonSchema,
    Lark,
    Regex,
)
from k2dist.service.answer_events import Accepted, AnswerEnd, AnswerEvent, Delta
from k2dist.service.client import AsyncClient
from k2dist.service.client_request import ClientRequest, PartialSampling
from k2dist.service.coordinator_actor import CoordinatorActor
from k2dist.service.whole_answer import WholeAnswer
from k2dist.text.chat import Chat, ToolChoice
from k2dist.text.tokenizer import CALL_END, SECTION_END, Tokenizer
from tests.grammar.conftest import CASES, Case, check_valid
from tests.grammar.test_engine import open_world
from tests.service.port_lane import PortLane

USER = ChatMessage(role="user", content="Call it.")


@pytest.fixture(scope="module")
def tiny_tokenizer(tiny_model_dir: Path) -> Tokenizer:
    return Tokenizer.load(tiny_model_dir)


@pytest.fixture
def world(tiny_model_dir: Path) -> Iterator[LocalWorld]:
    with open_world(tiny_model_dir) as world:
        yield world


def service_config() -> ClusterConfig:
    return ClusterConfig(
        name="test",
        parallel=ParallelConfig(lanes=1, tp=1),
        cache=CacheConfig(page_tokens=16, num_pages=8192),
        scheduler=SchedulerConfig(),
        service=ServiceConfig(grpc="127.0.0.1:0"),
    )


@asynccontextmanager
async def open_service(config: ClusterConfig, model_dir: Path, world: LocalWorld) -> AsyncIterator[str]:
    """A coordinator before the world's lane; its address."""
    actor = CoordinatorActor(config, model_dir, [PortLane(world.ports[0])])
    try:
        yield await actor.start()
    finally:
        await actor.stop()


@asynccontextmanager
async def serve(model_dir: Path, world: LocalWorld) -> AsyncIterator[AsyncClient]:
    async with (
        open_service(service_config(), model_dir, world) as address,
        AsyncClient(address) as client,
    ):
        yield client


def sampling(tokenizer: Tokenizer, constraint: Constraint | None = None, **fields: Any) -> PartialSampling:
    marks = [*b'"}]', tokenizer.special_id(CALL_END), tokenizer.special_id(SECTION_END)]
    bias = {**dict.fromkeys(marks, 6.0), **dict.fromkeys(b" \n\t\\[{,0123456789", -3.0)}
    said = {"temperature": 1.0, "max_tokens": 300, "logit_bias": bias, "seed": 7, **fields}
    return PartialSampling(**said, constraint=constraint)


async def gather(client: AsyncClient, request: ClientRequest) -> tuple[WholeAnswer, list[AnswerEvent]]:
    """The answer put together, and what it was put together from."""
    whole, events = WholeAnswer(), []
    async for event in client.generate(request):
        whole.add(event)
        events.append(event)
    return whole, events


def forced(tokenizer: Tokenizer, case: Case, **fields: Any) -> ClientRequest:
    function = {"name": "f", "parameters": case.schema}
    chat = Chat(
        messages=(USER,),
        tools=({"type": "function", "function": function},),
        tool_choice=ToolChoice(mode="named", name="f"),
    )
    return ClientRequest(prompt=chat, sampling=sampling(tokenizer, **fields))


def test_forced_calls_of_noise_over_grpc(
    tiny_model_dir: Path, world: LocalWorld, tiny_tokenizer: Tokenizer
) -> None:
    """Valid when they end, streamed in many pieces and read again in one; LENGTH when they do not."""
    cases = [case for case in CASES if case.name in ("weather", "tree", "keys_russian", "map_and_properties")]

    async def one(client: AsyncClient, case: Case) -> bool:
        request = forced(tiny_tokenizer, case, stop=("never",), logprobs=1)
        whole, events = await gather(client, request)
        accepted = events[0]
        assert isinstance(accepted, Accepted)
        again = WholeAnswer()
        async for event in client.resume(accepted.request_id):  # all of it at once: it has ended
            again.add(event)
        assert (again.text, again.tool_calls) == (whole.text, whole.tool_calls)
        assert len(whole.logprobs) == len(whole.token_ids)
        assert whole.finished is not None
        if whole.finished.reason is AnswerEnd.LENGTH:
            return False
        assert whole.finished.reason is AnswerEnd.TOOL_CALLS
        (call,) = whole.tool_calls
        assert (call.name, whole.text) == ("f", "")
        assert sum(isinstance(event, Delta) for event in events) > 2
        check_valid(str(call.arguments), case.schema)
        return True

    async def all_of_them() -> None:
        async with serve(tiny_model_dir, world) as client:
            ended = await asyncio.gather(*(one(client, case) for case in cases))
            assert sum(ended) >= 3
            whole, _ = await gather(client, forced(tiny_tokenizer, cases[0], max_tokens=15))
            assert whole.finished is not None
            assert whole.finished.reason is AnswerEnd.LENGTH

    asyncio.run(asyncio.wait_for(all_of_them(), 120))


def test_every_kind_over_grpc(tiny_model_dir: Path, world: LocalWorld, tiny_tokenizer: Tokenizer) -> None:
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]}
    kinds: list[tuple[Constraint, Any]] = [
        (JsonSchema(schema=json.dumps(schema)), lambda text: check_valid(text, schema)),
        (JsonObject(), lambda text: isinstance(json.loads(text), dict)),
        (Regex(pattern="[ab]{7}"), lambda text: len(text) == 7 and set(text) <= {"a", "b"}),
        (Choice(choices=("left", "right")), lambda text: text in ("left", "right")),
        (Lark(grammar='start: "<" start ">" | "x"'), lambda text: text.strip("<>") == "x"),
    ]

    async def one(client: AsyncClient, constraint: Constraint, holds: Any) -> None:
        said = sampling(tiny_tokenizer, constraint, logit_bias={ord("x"): 5.0, ord("}"): 9.0, ord('"'): 6.0})
        whole = [WholeAnswer(index) for index in range(3)]
        async for event in client.generate(ClientRequest(prompt="Answer:", sampling=said, num_outputs=3)):
            for each in whole:
                each.add(event)
        for each in whole:
            assert each.finished is not None
            assert each.finished.reason is AnswerEnd.STOP, constraint
            assert holds(each.text), each.text
        assert len({each.text for each in whole}) > 1 or not isinstance(constraint, Regex)

    async def all_of_them() -> None:
        async with serve(tiny_model_dir, world) as client:
            await asyncio.gather(*(one(client, constraint, holds) for constraint, holds in kinds))

    asyncio.run(asyncio.wait_for(all_of_them(), 60))
