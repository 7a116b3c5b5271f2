"""Whatever bytes are sent over gRPC: an answer or a refusal, no fault of the server's, nothing left over."""

from __future__ import annotations

import asyncio
import logging
import random
from typing import Any

import grpc
import pytest
from google.rpc import status_pb2  # type: ignore[import-untyped]

from k2dist._proto.v1 import control_pb2
from k2dist._proto.v1 import inference_pb2 as pb
from k2dist.messages import ChatMessage, JsonSchema, ToolCall
from k2dist.service.client import AsyncClient
from k2dist.service.client_request import Chat, ClientRequest, PartialSampling
from k2dist.service.error_codes import DETAILS_KEY
from k2dist.service.grpc_server import CONTROL, INFERENCE
from k2dist.service.wire_requests import write_request
from k2dist.text.chat import ToolChoice
from k2dist.text.tokenizer import Tokenizer
from tests.service.conftest import Serve
from tests.service.fake_lane import FakeLane
from tests.service.http_clients import WEATHER

AT_ONCE = 16
ANSWERED_S = 10.0

FINE = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.RESOURCE_EXHAUSTED,  # more asked for at once than there is
    grpc.StatusCode.CANCELLED,  # aborted by another input
}


def _messages() -> list[tuple[str, bytes]]:
    """Method and a good message of it."""
    chat = Chat(
        messages=(
            ChatMessage(role="user", content="Hello, wörld"),
            ChatMessage(
                role="assistant",
                content="",
                tool_calls=(ToolCall(id="functions.get_weather:0", name="get_weather", arguments="{}"),),
            ),
            ChatMessage(role="tool", content="21", tool_call_id="functions.get_weather:0"),
        ),
        tools=(WEATHER,),
        tool_choice=ToolChoice(mode="auto"),
    )
    sampling = PartialSampling(
        temperature=0.5, top_p=0.9, seed=3, max_tokens=4, stop=("b", "xyz"), logprobs=2, logit_bias={97: 1.0}
    )
    schema = JsonSchema(schema='{"type": "object", "properties": {"a": {"type": "integer"}}}')
    requests = (
        ClientRequest(prompt=chat, sampling=sampling, request_id="r1", num_outputs=2, timeout_s=5.0),
        ClientRequest(prompt=(1, 2, 300), sampling=PartialSampling(max_tokens=3, prompt_logprobs=1)),
        ClientRequest(prompt="text", sampling=PartialSampling(max_tokens=3, constraint=schema)),
    )
    generate = [(f"/{INFERENCE}/Generate", write_request(one).SerializeToString()) for one in requests]
    resume = pb.ResumeRequest(request_id="r1")
    getattr(resume, "from").add(output_index=1, token_index=2)
    others: list[tuple[str, Any]] = [
        ("Resume", resume),
        ("Abort", pb.AbortRequest(request_id="r1")),
        ("ListModels", pb.ListModelsRequest()),
        ("Tokenize", pb.TokenizeRequest(text="some <|im_end|> text", allow_special=True)),
        ("Detokenize", pb.DetokenizeRequest(token_ids=[1, 2, 300], skip_special=True)),
        ("ApplyChatTemplate", pb.ApplyChatTemplateRequest(chat=write_request(requests[0]).chat)),
    ]
    topology = (f"/{CONTROL}/GetTopology", control_pb2.GetTopologyRequest().SerializeToString())
    return [
        *generate,
        *((f"/{INFERENCE}/{name}", message.SerializeToString()) for name, message in others),
        topology,
    ]


def mutate(data: bytes, others: list[bytes], draw: random.Random) -> bytes:
    """A few bytes of it changed, taken out, doubled, or put in from another message."""
    raw = bytearray(data)
    for _ in range(draw.randint(0, 4)):
        place = draw.randrange(len(raw) + 1)
        match draw.randrange(6):
            case 0 if raw:
                raw[place % len(raw)] ^= 1 << draw.randrange(8)
            case 1:
                raw[place:place] = draw.randbytes(draw.randint(1, 8))
            case 2:
                del raw[place : place + draw.randint(1, 8)]
            case 3:
                end = place + draw.randint(1, 64)
                raw[place:place] = raw[place:end]
            case 4:
                other = draw.choice(others)
                start = draw.randrange(len(other) + 1)
                raw[place:place] = other[start : start + draw.randint(1, 64)]
            case _:  # a varint as long as there is, or a length that is not there
                raw[place:place] = draw.choice((b"\xff" * 9 + b"\x01", b"\x7a\xff\xff\x03", b"\x00", b"\x80"))
    return bytes(raw)


async def fuzz(
    client: AsyncClient,
    lane: FakeLane,
    num_inputs: int,
    caplog: pytest.LogCaptureFixture,
    draw: random.Random,
) -> None:
    messages = _messages()
    others = [data for _, data in messages]
    seen: set[grpc.StatusCode] = set()

    async def one() -> None:
        method, data = draw.choice(messages)
        raw = mutate(data, others, draw)
        call: Any = channel.unary_stream(method)(raw, timeout=ANSWERED_S)  # it ends, however it ends
        try:
            async for _ in call:
                pass
            code, said = await call.code(), ""
        except grpc.aio.AioRpcError as error:
            code, said = error.code(), error.details() or ""
            _check_details(error)
        assert code in FINE, (method, raw.hex(), code, said)
        assert "Traceback" not in said
        seen.add(code)

    async with grpc.aio.insecure_channel(client.address) as channel:
        for _ in range(0, num_inputs, AT_ONCE):
            await asyncio.gather(*(one() for _ in range(AT_ONCE)))
        assert await client.tokenize("still here") == list(b"still here")
    for _ in range(500):
        if lane.num_pages_used == 0:
            break
        await asyncio.sleep(0.01)
    assert lane.num_pages_used == 0, "a page leaked"
    topology = await client.topology()
    assert (topology.queued_requests, topology.live_outputs) == (0, 0), "a request is stuck"
    assert {grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT} <= seen, "too tame, or too wild"
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def _check_details(error: grpc.aio.AioRpcError) -> None:
    """What our code refuses says why in google.rpc's form too."""
    metadata: Any = error.trailing_metadata()
    if DETAILS_KEY in metadata:
        status = status_pb2.Status.FromString(metadata[DETAILS_KEY])
        assert status.code == error.code().value[0]
        assert status.message == error.details()


@pytest.mark.parametrize("num_inputs", [500, pytest.param(10_000, marks=pytest.mark.slow)])
async def test_no_bytes_are_the_servers_fault(
    num_inputs: int, serve: Serve, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture, seed: int
) -> None:
    lane = FakeLane(tokenizer)
    async with serve(lane) as client:
        await fuzz(client, lane, num_inputs, caplog, random.Random(seed))
