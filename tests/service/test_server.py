"""Health, reflection, the unary calls, and the synchronous client."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from contextlib import suppress
from queue import Queue

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

from k2dist._proto.v1 import control_pb2
from k2dist.client import Chat, ChatMessage, Client, ClientRequest, Finished, ToolCall, WholeAnswer
from k2dist.errors import RequestError, UnavailableError
from k2dist.service import wire_options
from k2dist.service.reflection_v1 import V1_NAME
from k2dist.text.chat import render_text
from k2dist.text.tokenizer import IM_END, Tokenizer
from tests.service.conftest import Serve
from tests.service.fake_lane import FakeLane

SERVING = health_pb2.HealthCheckResponse.SERVING


async def test_health_answers_for_the_server_and_each_service(serve: Serve, tokenizer: Tokenizer) -> None:
    async with serve(FakeLane(tokenizer)) as client, grpc.aio.insecure_channel(client.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for service in ("", "k2dist.v1.Inference", "k2dist.v1.Control"):
            response = await stub.Check(health_pb2.HealthCheckRequest(service=service))
            assert response.status == SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Check(health_pb2.HealthCheckRequest(service="other"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("name", ["grpc.reflection.v1alpha.ServerReflection", V1_NAME])
async def test_reflection_lists_and_describes_services(serve: Serve, tokenizer: Tokenizer, name: str) -> None:
    async with serve(FakeLane(tokenizer)) as client, grpc.aio.insecure_channel(client.address) as channel:
        call = channel.stream_stream(
            f"/{name}/ServerReflectionInfo",
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )
        requests = [
            reflection_pb2.ServerReflectionRequest(list_services=""),
            reflection_pb2.ServerReflectionRequest(file_containing_symbol="k2dist.v1.Inference"),
        ]
        services, file = [response async for response in call(iter(requests))]
        listed = {service.name for service in services.list_services_response.service}
        assert {"k2dist.v1.Inference", "k2dist.v1.Control", "grpc.health.v1.Health"} <= listed
        assert b"GenerateRequest" in file.file_descriptor_response.file_descriptor_proto[0]


async def test_tokenize_and_detokenize_are_inverse(serve: Serve, tokenizer: Tokenizer) -> None:
    async with serve(FakeLane(tokenizer)) as client:
        ids = await client.tokenize("né <|im_end|>")
        assert ids == list("né <|im_end|>".encode())
        assert await client.detokenize(ids) == "né <|im_end|>"
        special = await client.tokenize("a<|im_end|>", allow_special=True)
        assert special == [ord("a"), tokenizer.special_id(IM_END)]
        assert await client.detokenize(special) == "a<|im_end|>"
        assert await client.detokenize(special, skip_special=True) == "a"
        assert await client.detokenize([0xF0, 0x9F]) == "�"


async def test_the_template_is_rendered_with_calls_renamed(serve: Serve, tokenizer: Tokenizer) -> None:
    call = ToolCall(id="call_17", name="add", arguments='{"a": 1}')
    messages = (
        ChatMessage(role="system", content="Be brief."),
        ChatMessage(role="user", content="1 + 1?", name="Ann"),
        ChatMessage(role="assistant", tool_calls=(call,)),
        ChatMessage(role="tool", content="2", tool_call_id="call_17", name="add"),
    )
    async with serve(FakeLane(tokenizer)) as client:
        opened = await client.apply_chat_template(Chat(messages=messages))
        closed = await client.apply_chat_template(Chat(messages=messages), add_generation_prompt=False)
    assert opened.text == render_text(messages)
    assert "functions.add:0" in opened.text
    assert opened.text.removeprefix(closed.text) == "<|im_assistant|>assistant<|im_middle|>"
    assert opened.token_ids[: len(closed.token_ids)] == closed.token_ids


async def test_the_model_and_the_topology_are_told(serve: Serve, tokenizer: Tokenizer) -> None:
    async with serve(FakeLane(tokenizer, lane=0), FakeLane(tokenizer, lane=1)) as client:
        (model,) = await client.models()
        topology = await client.topology()
    assert (model.name, model.vocab_size) == ("tiny", 512)
    assert model.max_positions == 1024  # 64 pages of 16 tokens: less than the context of 2048
    assert list(model.end_token_ids) == [257, 258, 265]
    assert (topology.cluster, topology.model) == ("test", "tiny")
    assert topology.state == control_pb2.SERVICE_STATE_SERVING
    assert [(lane.lane, lane.num_pages_free) for lane in topology.lanes] == [(0, 64), (1, 64)]


async def test_the_synchronous_client_does_the_same(serve: Serve, tokenizer: Tokenizer) -> None:
    def use(address: str) -> None:
        with Client(address) as client:
            answer = WholeAnswer()
            for event in client.chat([ChatMessage(role="user", content="Hello")]):
                answer.add(event)
            assert answer.text == "abcdefghijklmnopqrstuvwxyz"
            assert client.tokenize("ab") == [97, 98]
            assert client.models()[0].name == "tiny"
            with pytest.raises(RequestError, match="prompt: empty"):
                list(client.generate(ClientRequest(prompt="")))

    async with serve(FakeLane(tokenizer)) as client:
        await asyncio.to_thread(use, client.address)


async def test_what_a_closed_client_still_reads_ends_with_it(serve: Serve, tokenizer: Tokenizer) -> None:
    lane = FakeLane(tokenizer, script=lambda _: [97] * 1000, step_s=0.005)

    def use(address: str) -> None:
        client = Client(address)
        has_begun, ended = threading.Event(), Queue[Exception]()

        def read() -> None:
            try:
                for _ in client.generate(ClientRequest(prompt="x")):
                    has_begun.set()
            except UnavailableError as error:
                ended.put(error)

        reading = threading.Thread(target=read)
        reading.start()
        assert has_begun.wait(10)
        client.close()
        assert "closed" in str(ended.get(timeout=10))
        reading.join(10)
        with pytest.raises(UnavailableError, match="closed"):
            client.models()

    async with serve(lane) as client:
        await asyncio.to_thread(use, client.address)
        while not lane.cancelled:
            await asyncio.sleep(0.001)


async def test_leaving_a_synchronous_iterator_ends_its_request(serve: Serve, tokenizer: Tokenizer) -> None:
    lane = FakeLane(tokenizer, script=lambda _: [97] * 1000, step_s=0.005)

    def use(address: str) -> None:
        with Client(address) as client:
            events = client.generate(ClientRequest(prompt="x"))
            assert not isinstance(next(events), Finished)
            events.close()

    async with serve(lane) as client:
        await asyncio.to_thread(use, client.address)
        while not lane.cancelled:
            await asyncio.sleep(0.001)


READS_AND_LEAVES = """
import sys, threading
from contextlib import suppress
from k2dist.client import Client, ClientRequest, K2Error

def read(client, has_begun):
    with suppress(K2Error):
        for _ in client.generate(ClientRequest(prompt="x")):
            has_begun.set()

for _ in range(30):
    with Client(sys.argv[1]) as client:
        begun = [threading.Event() for _ in range(3)]
        for event in begun:
            threading.Thread(target=read, args=(client, event), daemon=True).start()
        assert all(event.wait(10) for event in begun)
"""


async def test_clients_that_are_closed_while_they_read_leave_no_noise(
    serve: Serve, tokenizer: Tokenizer
) -> None:
    """grpc.aio tells of a cancelled call later, through any loop of the process, and complains of a loop that
    is closed."""
    lane = FakeLane(tokenizer, script=lambda _: [97] * 1000, step_s=0.002)
    async with serve(lane) as client:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            READS_AND_LEAVES,
            client.address,
            stderr=asyncio.subprocess.PIPE,
            env=os.environ | {"GRPC_VERBOSITY": "ERROR"},
        )
        _, said = await process.communicate()
    assert (said.decode(), process.returncode) == ("", 0)


async def test_connections_without_calls_are_closed_and_opened_again(
    serve: Serve, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire_options, "_IDLE_MS", 300)
    monkeypatch.setattr(wire_options, "_HANDSHAKE_MS", 300)
    monkeypatch.setattr(wire_options, "_MAX_CONNECTIONS", 3)
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"  # and empty settings
    async with serve(FakeLane(tokenizer)) as client:
        host, _, port = client.address.partition(":")
        assert (await client.models())[0].name == "tiny"
        for said in (b"", preface):  # silent from the start; after the handshake
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(said)
            await asyncio.wait_for(reader.read(), 10)
            writer.close()
        silent = [await asyncio.open_connection(host, int(port)) for _ in range(4)]
        with suppress(ConnectionError):
            assert await silent[-1][0].read() == b"", "one more than there may be"
        for _, writer in silent:
            writer.close()
        await asyncio.sleep(0.5)  # by now the client's own is gone too
        assert (await client.models())[0].name == "tiny"
