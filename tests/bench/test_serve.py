"""`k2dist bench serve` and `bench gateway`: what they count is what a server did."""

from __future__ import annotations

import asyncio
import json
from array import array
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import islice
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from msgspec.structs import replace

from k2dist.bench.carriers import _config
from k2dist.bench.gateway import GatewayReport, Window
from k2dist.bench.gateway import measure as measure_gateway
from k2dist.bench.percentiles import Percentiles
from k2dist.bench.serve import Load, measure
from k2dist.bench.serve_asks import made_up, of_file
from k2dist.bench.serve_report import Sample, summarise
from k2dist.bench.serve_targets import make_target
from k2dist.bench.stub_lane import StubLane
from k2dist.config.cluster import TlsConfig
from k2dist.demo import MODEL_DIR
from k2dist.errors import K2Error, UnavailableError, UsageError
from k2dist.service.coordinator_actor import CoordinatorActor
from k2dist.service.gateway_actor import GatewayActor
from k2dist.service.new_key import add_key
from k2dist.service.tls import ClientTls
from tests.service.certificates import Authority


@asynccontextmanager
async def served(**service: object) -> AsyncIterator[tuple[str, str]]:
    """gRPC's and HTTP's address of a real service before a stub lane that makes 2,000 tokens/s."""
    made: list[int] = []
    config = _config(8)
    config = replace(config, service=replace(config.service, **service))
    lane = StubLane(ord("a"), lambda: 2000.0, made.append)
    coordinator = CoordinatorActor(config, MODEL_DIR, (lane,), inner_key="of-the-gateway")
    gateway = GatewayActor(config, "of-the-gateway")
    grpc = await coordinator.start()
    try:
        yield grpc, await gateway.start(grpc, "127.0.0.1:0")
    finally:
        await gateway.stop()
        await coordinator.stop()


@pytest.mark.parametrize("kind", ["grpc", "http"])
def test_every_token_that_a_server_made_is_counted(kind: str) -> None:
    async def run() -> None:
        async with served() as (grpc, http):
            url = f"grpc://{grpc}" if kind == "grpc" else f"http://{http}/v1"
            target = make_target(url, model="", timeout_s=30)
            done: list[None] = []
            load = Load(num_requests=12, concurrency=4)
            report = await measure(target, made_up(10, 20, seed=1), load, lambda: done.append(None))
        assert (report.num_requests, report.num_failed, len(done)) == (12, 0, 12)
        assert (report.prompt_tokens, report.completion_tokens) == (120, 240)
        assert report.first_ms.count == report.token_ms.count == report.whole_ms.count == 12
        assert report.event_ms.count == round(240 / report.tokens_per_event) - 12
        assert 0 < report.first_ms.p50 < report.whole_ms.p50
        assert report.completion_tokens_per_s == pytest.approx(20 * report.requests_per_s)

    asyncio.run(asyncio.wait_for(run(), 20))


@pytest.mark.parametrize("kind", ["grpc", "http"])
def test_conversations_come_from_a_file(kind: str, tmp_path: Path) -> None:
    lines = [{"prompt": "Hello"}, {"messages": [{"role": "user", "content": "Hi"}], "temperature": 0.5}]
    (tmp_path / "asks.jsonl").write_text("\n".join(map(json.dumps, lines)))

    async def run() -> None:
        async with served() as (grpc, http):
            url = f"grpc://{grpc}" if kind == "grpc" else f"http://{http}"
            target = make_target(url, model="", timeout_s=30)
            asks = of_file(tmp_path / "asks.jsonl", output_len=7, seed=0)
            report = await measure(target, asks, Load(num_requests=5, rate_per_s=1000.0))
        assert (report.num_failed, report.completion_tokens) == (0, 35)

    asyncio.run(asyncio.wait_for(run(), 20))


@pytest.mark.parametrize("kind", ["grpc", "http"])
def test_a_guarded_server_is_reached_with_a_key_and_its_ca(kind: str, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    pair = authority.issue("server", "127.0.0.1")
    mutual = TlsConfig(cert=pair.cert, key=pair.key, ca=authority.ca, client_ca=authority.ca)
    key = add_key(tmp_path / "keys.yaml", tenant="a")
    shown = ClientTls(ca=authority.ca, cert=pair.cert, key=pair.key)

    async def run() -> None:
        async with served(api_keys=str(tmp_path / "keys.yaml"), tls=mutual) as (grpc, http):
            url = f"grpc://{grpc}" if kind == "grpc" else f"https://{http}"

            async def num_failed(tls: ClientTls | None, api_key: str) -> int:
                target = make_target(url, model="", timeout_s=10, tls=tls, api_key=api_key)
                return (await measure(target, made_up(4, 4, seed=0), Load(num_requests=2))).num_failed

            assert await num_failed(shown, key) == 0
            for tls, api_key in ((shown, ""), (replace(shown, cert=None, key=None), key), (None, key)):
                with pytest.raises(K2Error):
                    await num_failed(tls, api_key)

    asyncio.run(asyncio.wait_for(run(), 30))
    with pytest.raises(UsageError, match="--ca is for TLS"):
        make_target("http://127.0.0.1:1", model="", timeout_s=1, tls=shown)


def test_what_fails_is_counted_by_its_words() -> None:
    async def run() -> None:
        async with served() as (_, http):
            target = make_target(f"http://{http}", model="another", timeout_s=30)
            with pytest.raises(UnavailableError, match="no request was answered: HTTP 404: model: 'another'"):
                await measure(target, made_up(4, 4, seed=0), Load(num_requests=3))

    asyncio.run(asyncio.wait_for(run(), 20))
    nobody = make_target("http://127.0.0.1:9", model="", timeout_s=5)
    with pytest.raises(UnavailableError, match="is it running"):
        asyncio.run(measure(nobody, made_up(4, 4, seed=0), Load(num_requests=1)))


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (b'data: {"choices": [{"text": "a"}]}\n\n', "broke off before"),
        (b'data: {"choices": [{"text": "a"}]}\n\ndata: {"error": {"message": "lost"}}\n\n', "lost"),
        (b"data: {\n\n", "a chunk that is none"),
    ],
)
def test_a_stream_that_ends_badly_has_failed(body: bytes, error: str) -> None:
    async def answer(request: web.Request) -> web.Response:
        assert request.headers["authorization"] == "Bearer secret"
        return web.Response(body=body, content_type="text/event-stream")

    async def run() -> None:
        app = web.Application()
        app.router.add_post("/v1/completions", answer)
        async with TestServer(app) as server:
            target = make_target(str(server.make_url("")), model="m", api_key="secret", timeout_s=5)
            with pytest.raises(UnavailableError, match=error):
                await measure(target, made_up(4, 4, seed=0), Load(num_requests=1))

    asyncio.run(asyncio.wait_for(run(), 20))


def test_percentiles_are_of_what_clients_waited() -> None:
    late = Sample(due_s=1.0, first_s=3.0, last_s=4.0, ended_s=5.0, num_events=3, completion_tokens=11)
    late.gap_s = array("f", [0.25, 0.75])
    failed = Sample(due_s=0.0, ended_s=1.0, error="no")
    report = summarise("u", [late, failed, failed])
    assert (report.num_requests, report.num_failed, report.errors) == (3, 2, {"no": 2})
    assert report.first_ms.p50 == 2000  # from when it was due, however late it was sent
    assert report.token_ms.mean == 100
    assert (report.event_ms.count, report.event_ms.max) == (2, 750)
    assert (report.whole_ms.p99, report.seconds, report.requests_per_s) == (4000, 5.0, 0.2)
    assert Percentiles.of(range(101)) == Percentiles(
        count=101, mean=50.0, p50=50.0, p90=90.0, p95=95.0, p99=99.0, max=100.0
    )


def test_made_up_prompts_have_their_length_and_differ(seed: int) -> None:
    asks = list(islice(made_up(30, 5, seed), 20))
    assert {len(ask.token_ids) for ask in asks} == {30}
    assert len({ask.token_ids for ask in asks}) == 20
    assert asks == list(islice(made_up(30, 5, seed), 20))


@pytest.mark.parametrize(
    ("text", "words"),
    [("", "empty"), ("{", "asks.jsonl:1: not JSON"), ("[]", "not a JSON object"), ("{}", "needs `messages`")],
)
def test_a_bad_file_is_named_with_its_line(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "asks.jsonl"
    path.write_text(text)
    with pytest.raises(UsageError, match=words):
        of_file(path, None, 0)


def test_a_url_of_another_kind_is_refused() -> None:
    with pytest.raises(UsageError, match="grpc://HOST:PORT"):
        make_target("ftp://x", model="", timeout_s=1)


def test_a_pace_is_held_if_its_tokens_come_one_by_one() -> None:
    held = Window(pace_per_s=100.0, events_per_s=98.0, tokens_per_event=1.0, us_per_event={})
    merged = Window(pace_per_s=200.0, events_per_s=120.0, tokens_per_event=1.6, us_per_event={})
    report = GatewayReport(
        over="sse", num_streams=1, num_cores=1, windows=(held, merged), num_answers=0, rss_mb={}
    )
    assert report.best == held


def test_the_gateway_carries_what_the_stub_makes() -> None:
    """All its processes, for a second."""
    report = measure_gateway("sse", num_streams=4, pace_per_s=100.0, seconds=1.0)
    (window,) = report.windows
    assert window.events_per_s == pytest.approx(100, rel=0.5)
    assert set(window.us_per_event) == {"coordinator", "gateway", "clients"}
    assert all(min(readings) > 10 for readings in report.rss_mb.values())
