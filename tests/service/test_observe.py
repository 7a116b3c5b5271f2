"""What a served cluster says of itself: health with names, every metric, the way of a request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from k2dist.config.cluster import ClusterConfig
from k2dist.service import health_keeper, state
from k2dist.service.client import AsyncClient
from k2dist.service.coordinator_actor import CoordinatorActor
from k2dist.service.error_codes import UnknownRequestError
from k2dist.service.gateway_actor import GatewayActor
from k2dist.service.metric_table import METRICS
from k2dist.service.metrics import PREFIX
from k2dist.text.tokenizer import Tokenizer
from tests.service.fake_lane import FakeLane
from tests.service.fake_world import FakeWorld
from tests.service.http_clients import HELLO

CHAT = "/v1/chat/completions"


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> FakeWorld:
    monkeypatch.setattr(state, "FRESH_S", 0.0)
    monkeypatch.setattr(health_keeper, "_LOOK_S", 0.02)
    return FakeWorld()


@asynccontextmanager
async def serving(
    config: ClusterConfig, model_dir: Path, world: FakeWorld, *lanes: FakeLane
) -> AsyncIterator[tuple[httpx.AsyncClient, str]]:
    """A gateway before a coordinator with a supervisor; where the coordinator listens."""
    coordinator = CoordinatorActor(config, model_dir, lanes, supervision=world)
    gateway = GatewayActor(config)
    address = await coordinator.start()
    url = f"http://{await gateway.start(address, '127.0.0.1:0')}"
    for lane in lanes:
        lane.start()
    try:
        async with httpx.AsyncClient(base_url=url, timeout=15) as http:
            yield http, address
    finally:
        await gateway.stop()
        await coordinator.stop()
        for lane in lanes:
            await lane.stop()


async def test_a_hang_turns_health_red_and_names_the_late_rank(
    config: ClusterConfig, model_dir: Path, tokenizer: Tokenizer, world: FakeWorld
) -> None:
    """Half of deadlines.step_s is the bound; when the rank goes on, so does health, for gRPC too."""
    lane = FakeLane(tokenizer, step_s=0.05)
    async with serving(config, model_dir, world, lane) as (http, address), AsyncClient(address) as client:
        assert (await http.get("/health")).status_code == 200
        asking = asyncio.ensure_future(http.post(CHAT, json={"messages": HELLO}))
        while lane.num_pages_used == 0:
            await asyncio.sleep(0.005)
        world.late_s = config.deadlines.step_s / 2 - 1
        assert (await http.get("/health")).status_code == 200
        world.late_s = config.deadlines.step_s / 2 + 1
        for path in ("/health", "/ready"):
            response = await http.get(path)
            assert response.status_code == 503
            assert response.json()["late_ranks"] == [1]
            assert "rank 1 is late: rank 0 waited 31 s in all_to_all_rows (world)" in response.text
        await await_grpc_health(client, health_pb2.HealthCheckResponse.NOT_SERVING)
        world.late_s = 0.0
        assert (await http.get("/health")).status_code == 200
        await await_grpc_health(client, health_pb2.HealthCheckResponse.SERVING)
        await asking


async def await_grpc_health(client: AsyncClient, wanted: int) -> None:
    async with grpc.aio.insecure_channel(client.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        while (await stub.Check(health_pb2.HealthCheckRequest())).status != wanted:
            await asyncio.sleep(0.02)


async def test_ready_only_when_every_rank_has_joined(
    config: ClusterConfig, model_dir: Path, tokenizer: Tokenizer, world: FakeWorld
) -> None:
    async with serving(config, model_dir, world, FakeLane(tokenizer)) as (http, _):
        world.states[1] = "loading"
        response = await http.get("/ready")
        assert (response.status_code, response.json()["reason"]) == (503, "loading: rank 1")
        assert (await http.get("/health")).status_code == 200
        world.states[1] = "joined"
        assert (await http.get("/ready")).status_code == 200
        world.is_gone = True
        assert (await http.get("/ready")).status_code == 200, "lanes serve on without a supervisor"


async def test_a_lane_that_does_not_answer_is_said_to_be_silent(
    config: ClusterConfig,
    model_dir: Path,
    tokenizer: Tokenizer,
    world: FakeWorld,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A stopped process answers nothing; the others' values come all the same, its own are the last ones."""
    monkeypatch.setattr(state, "_LANE_S", 0.05)
    lane = FakeLane(tokenizer)
    async with serving(config, model_dir, world, lane) as (http, _):
        before = (await http.get("/v1/cluster")).json()["lanes"][0]
        assert before["is_silent"] is False
        monkeypatch.setattr(lane, "load", lambda: asyncio.sleep(60))
        after = (await http.get("/v1/cluster")).json()["lanes"][0]
        assert after == before | {"is_silent": True}


async def test_every_metric_of_the_table_is_shown(
    config: ClusterConfig, model_dir: Path, tokenizer: Tokenizer, world: FakeWorld
) -> None:
    async with serving(config, model_dir, world, FakeLane(tokenizer)) as (http, _):
        await http.post(CHAT, json={"messages": HELLO, "user": "x"})
        found = read_metrics((await http.get("/metrics")).text)
    names = {name for name, _ in found}
    suffixes = ("", "_total", "_bucket")
    missing = [m.name for m in METRICS if not any(PREFIX + m.name + suffix in names for suffix in suffixes)]
    assert missing == ["decode_step_seconds", "decode_tokens_per_second"]  # only while something runs
    assert found["k2dist_dispatch_rows_sent_total", ("1",)] == 101
    assert found["k2dist_expert_rows_total", ("0",)] == 60
    assert found["k2dist_expert_load_skew", ("ranks",)] == pytest.approx((40 / 30 + 1) / 2)
    assert found["k2dist_expert_load_skew", ("experts",)] == pytest.approx((30 * 4 / 60 + 1) / 2)
    assert found["k2dist_collective_wait_seconds_total", ("all_to_all_rows", "world", "0")] == 0.5
    assert found["k2dist_exchange_overflows_total", ("0",)] == 2
    assert found["k2dist_masks_late_total", ("1",)] == 1
    assert found["k2dist_recoveries_total", ()] == 2
    assert found["k2dist_recovery_seconds_total", ()] == 9.5
    assert found["k2dist_tenant_tokens_total", ("generated", "")] == 27
    assert found["k2dist_tenant_requests_total", ("success", "")] == 1
    assert found["k2dist_request_queue_time_seconds_count", ()] == 1
    assert found["k2dist_prefix_cache_queries_total", ("0",)] == found["k2dist_prompt_tokens_total", ()]
    assert found["k2dist_healthy", ()] == found["k2dist_ready", ()] == 1


def read_metrics(text: str) -> dict[tuple[str, tuple[str, ...]], float]:
    """Value by name and labels' values in the order of the labels' names, the model's left out."""
    return {
        (sample.name, tuple(v for k, v in sorted(sample.labels.items()) if k != "model_name")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_requests_over_grpc_are_counted_like_those_over_http(
    config: ClusterConfig, model_dir: Path, tokenizer: Tokenizer, world: FakeWorld
) -> None:
    lane = FakeLane(tokenizer)
    async with serving(config, model_dir, world, lane) as (http, address), AsyncClient(address) as client:
        async for _ in client.chat(hello()):
            pass
        found = read_metrics((await http.get("/metrics")).text)
    assert found["k2dist_time_to_first_token_seconds_count", ()] == 1
    assert found["k2dist_generation_tokens_total", ()] == 27


def hello() -> list[Any]:
    from k2dist.messages import ChatMessage

    return [ChatMessage(role="user", content="Hello")]


async def test_the_way_of_a_request_can_be_asked_for(
    config: ClusterConfig, model_dir: Path, tokenizer: Tokenizer, world: FakeWorld
) -> None:
    lane = FakeLane(tokenizer, step_s=0.002)
    async with serving(config, model_dir, world, lane) as (http, address), AsyncClient(address) as client:
        body = {"messages": HELLO, "n": 2, "max_tokens": 5}
        first = (await http.post(CHAT, json=body)).json()
        second = (await http.post(CHAT, json=body)).json()
        traces = [await client.observe.trace(answer["id"]) for answer in (first, second)]
        with pytest.raises(UnknownRequestError):
            await client.observe.trace("chatcmpl-nobody")
    for trace in traces:
        assert trace.lane == 0
        assert trace.error == ""
        times = [0.0, trace.sent_s, trace.accepted_s, trace.outputs[0].first_token_s, trace.ended_s]
        assert times == sorted(times)  # type: ignore[type-var]  # none is None, or it could not be sorted
        assert [(output.num_tokens, output.finish) for output in trace.outputs] == [(5, "length")] * 2
        courses = [output.course for output in trace.outputs]
        assert all(course is not None and course.num_preemptions == 0 for course in courses)
    found = [output.course.cached_tokens for trace in traces for output in trace.outputs if output.course]
    assert found[0] == 0
    assert found[2] > 0, "the second found the first's pages"


async def test_what_a_page_needs_is_one_json(
    config: ClusterConfig, model_dir: Path, tokenizer: Tokenizer, world: FakeWorld
) -> None:
    async with serving(config, model_dir, world, FakeLane(tokenizer)) as (http, _):
        await http.post(CHAT, json={"messages": HELLO})
        response = await http.get("/v1/cluster")
    assert response.headers["cache-control"] == "no-store"
    shown = response.json()
    assert (shown["generation"], shown["generated_tokens"], shown["unwell"]) == (3, 27, "")
    assert shown["lanes"][0]["ranks"] == [0, 1]
    assert [rank["expert_rows"] for rank in shown["ranks"]] == [[40, 20], [20, 20]]
    assert "tenants" not in response.text
