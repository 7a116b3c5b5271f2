"""What is refused, with which status, and what the client makes of it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import msgspec
import pytest
from google.rpc import error_details_pb2, status_pb2

from k2dist._proto.v1 import inference_pb2 as pb
from k2dist._proto.v1 import inference_pb2_grpc
from k2dist.config.cluster import CacheConfig, ClusterConfig, SchedulerConfig, ServiceConfig
from k2dist.errors import CapacityError, PeerError, RequestError, UnavailableError, UsageError
from k2dist.ids import RequestId
from k2dist.messages import AdmitReply, ChatMessage
from k2dist.service.client import AsyncClient
from k2dist.service.client_request import Chat, ClientRequest, PartialSampling
from k2dist.service.coordinator_actor import CoordinatorActor
from k2dist.service.error_codes import DETAILS_KEY, TABLE, RequestIdInUseError, UnknownRequestError
from k2dist.text.tokenizer import Tokenizer
from tests.service.conftest import Serve
from tests.service.fake_lane import FakeLane


def sampling(**fields: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(text="a", sampling=pb.Sampling(**fields))


def chat(**fields: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(chat=pb.Chat(**fields))


def tools(*functions: pb.FunctionTool, **choice: Any) -> pb.Chat:
    declared = [pb.Tool(function=function) for function in functions]
    return pb.Chat(messages=[USER], tools=declared, tool_choice=pb.ToolChoice(**choice))


USER = pb.ChatMessage(role="user", content="hi")
TOOL = pb.FunctionTool(name="f")
NOT = pb.FunctionTool(name="f", parameters_json='{"properties": {"a": {"not": {}}}}')
REFUSED: list[tuple[str, pb.GenerateRequest]] = [
    ("input", pb.GenerateRequest()),
    ("prompt", pb.GenerateRequest(text="")),
    ("prompt", pb.GenerateRequest(text="a" * 1024)),  # all of the context
    ("token_ids.ids[1]", pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1, 512]))),
    ("model", pb.GenerateRequest(text="a", model="gpt")),
    ("request_id", pb.GenerateRequest(text="a", request_id="")),
    ("request_id", pb.GenerateRequest(text="a", request_id="ä")),
    ("request_id", pb.GenerateRequest(text="a", request_id="x" * 129)),
    ("num_outputs", pb.GenerateRequest(text="a", num_outputs=0)),
    ("num_outputs", pb.GenerateRequest(text="a", num_outputs=129)),
    ("messages", chat()),
    ("chat.messages[0].role", chat(messages=[pb.ChatMessage(content="hi")])),
    ("messages[0].tool_call_id", chat(messages=[pb.ChatMessage(role="tool", content="3")])),
    ("chat.tools[0]", chat(messages=[USER], tools=[pb.Tool()])),
    ("chat.tools[0].json", chat(messages=[USER], tools=[pb.Tool(json="{")])),
    ("chat.tools[0].json", chat(messages=[USER], tools=[pb.Tool(json="[1]")])),
    (
        "chat.tools[0].function.parameters_json",
        chat(messages=[USER], tools=[pb.Tool(function=pb.FunctionTool(name="f", parameters_json="x"))]),
    ),
    ("chat.tools[0].function.name", chat(messages=[USER], tools=[pb.Tool(function=pb.FunctionTool())])),
    ("tools[0]", chat(messages=[USER], tools=[pb.Tool(json='{"type": "function"}')])),
    ("sampling.temperature", sampling(temperature=-0.1)),
    ("sampling.temperature", sampling(temperature=float("nan"))),
    ("sampling.top_p", sampling(top_p=0.0)),
    ("sampling.top_p", sampling(top_p=1.01)),
    ("sampling.min_p", sampling(min_p=1.5)),
    ("sampling.repetition_penalty", sampling(repetition_penalty=0.0)),
    ("sampling.presence_penalty", sampling(presence_penalty=2.5)),
    ("sampling.frequency_penalty", sampling(frequency_penalty=-2.5)),
    ("sampling.logit_bias[5]", sampling(logit_bias={5: 101.0})),
    ("sampling.logit_bias", sampling(logit_bias={512: 1.0})),
    ("sampling.max_tokens", sampling(max_tokens=0)),
    ("sampling.max_tokens", sampling(max_tokens=1024)),  # with the prompt one more than the context
    ("sampling.min_tokens", sampling(max_tokens=3, min_tokens=4)),
    ("sampling.stop[0]", sampling(stop=[""])),
    ("sampling.stop[1]", sampling(stop=["a", "b" * 1025])),
    ("sampling.stop", sampling(stop=["a"] * 65)),
    ("sampling.stop_token_ids[0]", sampling(stop_token_ids=[512])),
    ("sampling.logprobs", sampling(logprobs=21)),
    ("sampling.prompt_logprobs", sampling(prompt_logprobs=21)),
    ("timeout_s", pb.GenerateRequest(text="a", timeout_s=0.0)),
    ("timeout_s", pb.GenerateRequest(text="a", timeout_s=float("inf"))),
    # Fields of some later schema: GenerateRequest 29 (another constraint), Sampling 17, Chat 4.
    ("GenerateRequest", pb.GenerateRequest.FromString(b"\x1a\x01a\xe8\x01\x01")),
    ("sampling", pb.GenerateRequest(text="a", sampling=pb.Sampling.FromString(b"\x88\x01\x01"))),
    ("chat", pb.GenerateRequest(chat=pb.Chat.FromString(b"\x20\x01"))),
    ("json_schema", pb.GenerateRequest(text="a", json_schema='{"uniqueItems": true}')),
    ("regex", pb.GenerateRequest(text="a", regex="(?=a)")),
    ("choice", pb.GenerateRequest(text="a", choice=pb.Choice())),
    ("lark", pb.GenerateRequest(text="a", lark="begin: \"a\"")),
    ("tools", pb.GenerateRequest(chat=tools(NOT))),
    ("tools", pb.GenerateRequest(chat=tools(TOOL, TOOL))),
    ("tool_choice", pb.GenerateRequest(chat=tools(TOOL, mode="MODE_NAMED", name="g"))),
    ("tool_choice", pb.GenerateRequest(chat=tools(mode="MODE_REQUIRED"))),
    ("sampling.min_tokens", pb.GenerateRequest(text="a", regex="a", sampling=pb.Sampling(min_tokens=1))),
]  # fmt: skip


async def test_each_wrong_field_is_named(serve: Serve, tokenizer: Tokenizer) -> None:
    lane = FakeLane(tokenizer)
    async with serve(lane) as client, grpc.aio.insecure_channel(client.address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        for field, request in REFUSED:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                pytest.fail(f"{field} was accepted: {await anext(aiter(stub.Generate(request)))}")
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT, (field, caught.value)
            assert caught.value.details().startswith(f"{field}: ")
            info, violations = unpack(caught.value)
            assert (info.reason, info.domain) == ("INVALID_REQUEST", "k2dist")
            assert [violation.field for violation in violations.field_violations] == [field]
    assert lane.num_steps == 0 or lane.num_pages_used == 0


async def test_what_bounds_a_prompt_is_named(
    serve: Serve, tokenizer: Tokenizer, config: ClusterConfig
) -> None:
    long = ClientRequest(prompt="a" * 2048)
    pages = r"a lane's cache \(cache\.num_pages=64 of 16 tokens\) holds 1024"
    async with serve(FakeLane(tokenizer)) as client:
        with pytest.raises(RequestError, match=pages):
            await first_event(client, long)
    roomy = msgspec.structs.replace(config, cache=CacheConfig(page_tokens=16, num_pages=1024))
    async with serve(FakeLane(tokenizer), changed=roomy) as client:
        with pytest.raises(RequestError, match="the context holds 2048"):
            await first_event(client, long)


def unpack(error: grpc.aio.AioRpcError) -> tuple[error_details_pb2.ErrorInfo, error_details_pb2.BadRequest]:
    """The two details of a refused request's status."""
    status = status_pb2.Status.FromString(error.trailing_metadata()[DETAILS_KEY])
    assert status.code == error.code().value[0]
    info, violations = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    first, second = status.details
    assert first.Unpack(info)
    assert second.Unpack(violations)
    return info, violations


async def first_event(client: AsyncClient, request: ClientRequest) -> object:
    events = client.generate(request)
    try:
        return await anext(events)
    finally:
        await events.aclose()


async def test_the_client_raises_our_errors(serve: Serve, tokenizer: Tokenizer) -> None:
    async with serve(FakeLane(tokenizer)) as client:
        with pytest.raises(RequestError, match=r"sampling\.top_p: 2\.0 is outside") as caught:
            await first_event(client, ClientRequest(prompt="a", sampling=PartialSampling(top_p=2.0)))
        assert caught.value.field == "sampling.top_p"
        with pytest.raises(UnknownRequestError, match="'nobody' is not known"):
            _ = [event async for event in client.resume("nobody")]
        with pytest.raises(RequestError, match=r"token_ids: 100000 is outside"):
            await client.detokenize([100_000])


async def test_nobody_there_is_said_with_the_address() -> None:
    async with AsyncClient("127.0.0.1:1") as client:
        with pytest.raises(UnavailableError, match=r"127\.0\.0\.1:1: no k2dist server answers"):
            await client.models()


async def test_another_server_is_not_taken_for_k2dist() -> None:
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with AsyncClient(f"127.0.0.1:{port}") as client:
            with pytest.raises(UsageError, match="not a k2dist server"):
                await client.models()
    finally:
        await server.stop(None)


async def test_a_port_in_use_is_refused_by_name(
    serve: Serve, tokenizer: Tokenizer, config: ClusterConfig, model_dir: Path
) -> None:
    async with serve(FakeLane(tokenizer)) as client:
        taken = msgspec.structs.replace(config, service=ServiceConfig(grpc=client.address))
        second = CoordinatorActor(taken, model_dir, [FakeLane(tokenizer)])
        with pytest.raises(CapacityError, match=f"cannot listen on {client.address}"):
            await second.start()
        await second.stop()
        assert [model.name for model in await client.models()] == ["tiny"]  # the first one serves on


async def test_a_full_queue_is_no_capacity(serve: Serve, tokenizer: Tokenizer, config: ClusterConfig) -> None:
    one = msgspec.structs.replace(
        config,
        scheduler=SchedulerConfig(max_running=1),
        service=ServiceConfig(grpc="127.0.0.1:0", max_queued=1),
    )
    lane = FakeLane(tokenizer, step_s=0.02)
    async with serve(lane, changed=one) as client:
        running = client.generate(ClientRequest(prompt="a"))
        await anext(running)
        queued = asyncio.ensure_future(first_event(client, ClientRequest(prompt="b")))
        while (await client.topology()).queued_requests < 1:
            await asyncio.sleep(0.005)
        with pytest.raises(CapacityError, match=r"service\.max_queued=1"):
            await first_event(client, ClientRequest(prompt="c"))
        assert not queued.done()  # not accepted: it waits here
        await running.aclose()
        await queued  # and now it is


async def test_who_waits_too_long_is_refused(
    serve: Serve, tokenizer: Tokenizer, config: ClusterConfig
) -> None:
    short = msgspec.structs.replace(
        config,
        scheduler=SchedulerConfig(max_running=1),
        service=ServiceConfig(grpc="127.0.0.1:0", queue_s=0.1),
    )
    async with serve(FakeLane(tokenizer, step_s=0.05), changed=short) as client:
        running = client.generate(ClientRequest(prompt="a"))
        await anext(running)
        with pytest.raises(CapacityError, match=r"queue_s=0\.1"):
            await first_event(client, ClientRequest(prompt="b"))
        await running.aclose()


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (AdmitReply(request_id=RequestId(""), error="prompt: too long", field="prompt"), RequestError),
        (AdmitReply(request_id=RequestId(""), error="too many wait", retry_can_help=True), CapacityError),
    ],
)
async def test_what_a_lane_refuses_is_not_accepted(
    serve: Serve, tokenizer: Tokenizer, reply: AdmitReply, error: type[Exception]
) -> None:
    lane = FakeLane(tokenizer)
    lane.reply = reply
    async with serve(lane) as client:
        with pytest.raises(error, match=reply.error):
            await first_event(client, ClientRequest(prompt="a", request_id="again"))
        lane.reply = None
        events = [event async for event in client.generate(ClientRequest(prompt="y", request_id="again"))]
        assert len(events) > 2  # a refused id is free again


async def test_an_id_in_use_belongs_to_its_request(serve: Serve, tokenizer: Tokenizer) -> None:
    async with serve(FakeLane(tokenizer)) as client:
        request = ClientRequest(prompt="x", request_id="mine")
        first = [event async for event in client.generate(request)]
        again = [event async for event in client.generate(request)]
        assert first[0] == again[0]  # the same request, its drawn seed included
        with pytest.raises(RequestIdInUseError, match="mine belongs to another request"):
            await first_event(client, ClientRequest(prompt="y", request_id="mine"))


async def test_a_malformed_conversation_is_refused_by_tokenisation_too(
    serve: Serve, tokenizer: Tokenizer
) -> None:
    async with serve(FakeLane(tokenizer)) as client:
        with pytest.raises(RequestError, match="messages: empty"):
            await client.apply_chat_template(Chat(messages=()))
        with pytest.raises(RequestError, match="tool_call_id"):
            await client.apply_chat_template(Chat(messages=(ChatMessage(role="tool", content="1"),)))


def test_every_error_of_ours_has_a_row() -> None:
    assert TABLE[-1].error.__name__ == "K2Error"
    for index, row in enumerate(TABLE):
        shadowing = [above for above in TABLE[:index] if issubclass(row.error, above.error)]
        assert not shadowing, f"{row.error.__name__} is never reached"
    assert len({row.reason for row in TABLE}) == len(TABLE)
    assert {row.error for row in TABLE if row.error.retry_can_help} >= {
        CapacityError,
        PeerError,
        UnavailableError,
    }


def test_reasons_in_the_proto_are_those_of_the_table() -> None:
    text = (Path(__file__).resolve().parents[2] / "protos/k2dist/v1/inference.proto").read_text()
    for row in TABLE:
        line = next(line for line in text.splitlines() if line.startswith(f"//   {row.reason} "))
        assert row.code.name in line
        assert ("yes:" in line) == row.error.retry_can_help
