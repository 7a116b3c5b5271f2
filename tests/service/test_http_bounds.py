"""Clients that leave, dawdle, or send too much; what runs meanwhile is none of theirs."""

from __future__ import annotations

import asyncio
import json
import string
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

import httpx
import pytest
from msgspec.structs import replace

from k2dist.config.cluster import ClusterConfig
from k2dist.errors import CapacityError
from k2dist.service import http_app, http_exchange
from k2dist.service.http_server import HttpServer
from k2dist.text.tokenizer import Tokenizer
from tests.service.fake_lane import FakeLane
from tests.service.http_clients import HELLO, join_openai, post_stream, read_sse
from tests.service.http_server import ServeHttp

CHAT = "/v1/chat/completions"

WAIT_S = 30.0  # for what happens at once; the machine may be busy


async def await_that(condition: Callable[[], bool], what: str) -> None:
    give_up_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < give_up_s, what
        await asyncio.sleep(0.005)


@pytest.mark.parametrize("is_streamed", [True, False])
async def test_a_client_that_leaves_ends_its_request(
    serve_http: ServeHttp, tokenizer: Tokenizer, *, is_streamed: bool
) -> None:
    lane = FakeLane(tokenizer, step_s=0.005)
    body = {"messages": HELLO, "stream": is_streamed, "ignore_eos": True, "max_tokens": 900}
    async with serve_http(lane) as server:
        for num_before in range(5):
            asking = asyncio.ensure_future(server.http.post(CHAT, json=body))
            await await_that(lambda: lane.num_pages_used > 0, "it did not begin")
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            await await_that(lambda n=num_before: len(lane.cancelled) == n + 1, "the lane was not told")
            await await_that(lambda: lane.num_pages_used == 0, "its pages did not come home")
        metrics = (await server.http.get("/metrics")).text
    assert 'k2dist_http_requests_total{api="openai",model_name="tiny",outcome="abort"} 5.0' in metrics
    assert 'k2dist_http_requests_running{model_name="tiny"} 0.0' in metrics


async def test_a_client_that_leaves_while_it_waits_is_never_run(
    serve_http: ServeHttp, tokenizer: Tokenizer
) -> None:
    lane = FakeLane(tokenizer)
    lane.admit_gate.clear()
    async with serve_http(lane) as server:
        asking = asyncio.ensure_future(server.http.post(CHAT, json={"messages": HELLO}))
        async with asyncio.timeout(WAIT_S):
            while (await server.coordinator.stats()).num_outputs == 0:
                await asyncio.sleep(0.005)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        async with asyncio.timeout(WAIT_S):
            while 'outcome="abort"' not in (await server.http.get("/metrics")).text:
                await asyncio.sleep(0.005)
        lane.admit_gate.set()
        await await_that(lambda: len(lane.cancelled) == 1, "the lane was not told")


async def test_a_reader_that_reads_nothing_stalls_nobody(serve_http: ServeHttp, tokenizer: Tokenizer) -> None:
    """Its sockets fill up; others stream at their pace, and it finds its own answer whole when it wakes."""
    lane = FakeLane(tokenizer, script=lambda prompt: [ord("x")] * 900, step_s=0.0)
    body = {"messages": HELLO, "max_tokens": 900, "logprobs": True, "top_logprobs": 20, "stream": True}
    text = json.dumps(body).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n" % len(text)
    async with serve_http(lane) as server:
        host, port = server.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port), limit=1024)
        writer.write(head + text)
        await await_that(lambda: lane.num_pages_used > 0, "it did not begin")
        joined = join_openai(await post_stream(server.http, CHAT, {"messages": HELLO, "max_tokens": 900}))
        assert joined["choices"][0]["message"]["content"] == "x" * 900
        shown = b""
        while not shown.endswith(b"0\r\n\r\n"):
            more = await reader.read(1 << 16)
            assert more
            shown += more
        assert shown.count(b'"finish_reason":"length"') == 1
        assert b"[DONE]" in shown
        writer.close()
        await writer.wait_closed()


async def test_a_silent_stream_says_that_it_lives(
    serve_http: ServeHttp, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_exchange, "HEARTBEAT_S", 0.05)
    lane = FakeLane(tokenizer, step_s=0.2)
    body = {"messages": HELLO, "max_tokens": 2, "stream": True}
    async with serve_http(lane) as server:
        text = (await server.http.post(CHAT, json=body)).text
        async with server.http.stream("POST", CHAT, json=body) as response:
            assert [event async for event in read_sse(response)][-1].data == "[DONE]"
    assert ": still here\n\n" in text


async def test_too_much_is_refused_in_the_apis_form(
    serve_http: ServeHttp, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_app, "MAX_BODY_BYTES", 1000)
    async with serve_http(FakeLane(tokenizer)) as server:
        for path in (CHAT, "/v1/messages"):
            response = await server.http.post(path, content=b" " * 1001)
            assert response.status_code == 413
            assert "1000 bytes" in response.json()["error"]["message"]
        with suppress(httpx.ReadError):  # it hangs up before all of it is sent
            assert (await server.http.get("/live", headers={"x": "y" * 2_000_000})).status_code == 400
        assert (await server.http.get("/live")).status_code == 200


async def test_more_requests_than_may_run_are_to_come_again(
    serve_http: ServeHttp, tokenizer: Tokenizer, config: ClusterConfig
) -> None:
    small = replace(
        config,
        service=replace(config.service, max_queued=1),
        scheduler=replace(config.scheduler, max_running=1),
    )
    lane = FakeLane(tokenizer)
    lane.admit_gate.clear()  # nothing ends before all is seen
    async with serve_http(lane, changed=small) as server:
        running = [asyncio.ensure_future(server.http.post(CHAT, json={"messages": HELLO}))]
        while (await server.coordinator.stats()).num_outputs == 0:
            await asyncio.sleep(0.005)
        running.append(asyncio.ensure_future(server.http.post(CHAT, json={"messages": HELLO})))
        while (await server.coordinator.stats()).num_queued == 0:
            await asyncio.sleep(0.005)
        refused = await server.http.post(CHAT, json={"messages": HELLO})
        overloaded = await server.http.post("/v1/messages", json={"messages": HELLO, "max_tokens": 1})
        assert (refused.status_code, overloaded.status_code) == (503, 529)
        assert refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["code"] == "no_capacity"
        assert overloaded.json()["error"]["type"] == "overloaded_error"
        lane.admit_gate.set()
        for response in await asyncio.gather(*running):
            assert response.json()["choices"][0]["message"]["content"] == string.ascii_lowercase
        assert (await server.http.post(CHAT, json={"messages": HELLO})).status_code == 200


async def test_an_answer_that_breaks_off_says_so(serve_http: ServeHttp, tokenizer: Tokenizer) -> None:
    for path in (CHAT, "/v1/messages"):
        lane = FakeLane(tokenizer, script=lambda prompt: [ord("x")] * 900, step_s=0.01)
        body = {"messages": HELLO, "max_tokens": 900}
        async with serve_http(lane) as server:
            whole = asyncio.ensure_future(server.http.post(path, json=body))
            async with asyncio.timeout(WAIT_S):  # else the lane might die before it has this one
                while (await lane.load()).num_running == 0:
                    await asyncio.sleep(0.005)
            async with server.http.stream("POST", path, json=body | {"stream": True}) as response:
                events = []
                async for event in read_sse(response):
                    events.append(event)
                    if len(events) == 3:
                        lane.die("lane 0 died")
            error = json.loads(events[-1].data)["error"]
            assert "lane 0 died" in error["message"]
            assert (events[-1].event, error["type"]) in ((None, "server_error"), ("error", "api_error"))
            assert (await whole).status_code == 503
            assert "lane 0 died" in (await whole).json()["error"]["message"]


async def test_a_port_in_use_is_one_clear_line(serve_http: ServeHttp, tokenizer: Tokenizer) -> None:
    async with serve_http(FakeLane(tokenizer)) as server:
        address = server.url.removeprefix("http://")
        with pytest.raises(CapacityError, match=rf"service\.http: cannot listen on {address}"):
            HttpServer(address, max_connections=1)


async def test_a_body_that_trickles_is_given_up(
    serve_http: ServeHttp, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_app, "_BODY_S", 0.2)

    async def trickle() -> AsyncIterator[bytes]:
        yield b'{"messages": ['
        for _ in range(30):  # this client reads no answer before it has sent all
            await asyncio.sleep(0.02)
            yield b" "

    async with serve_http(FakeLane(tokenizer)) as server:
        for path in (CHAT, "/v1/messages"):
            response = await server.http.post(path, content=trickle())
            assert response.status_code == 408
            assert "did not arrive within 0.2 s" in response.json()["error"]["message"]
        assert (await server.http.get("/live")).status_code == 200
