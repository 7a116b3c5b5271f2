"""What the paths for operators say: alive, ready, healthy, measured."""

from __future__ import annotations

import asyncio

import pytest
from prometheus_client.parser import text_string_to_metric_families

from k2dist.service import coordinator_actor
from k2dist.text.tokenizer import Tokenizer
from tests.service.fake_lane import FakeLane
from tests.service.http_clients import HELLO, post_stream
from tests.service.http_server import ServeHttp

CHAT = "/v1/chat/completions"


async def test_a_draining_server_is_healthy_and_not_ready(
    serve_http: ServeHttp, tokenizer: Tokenizer
) -> None:
    """Streams finish, and new requests are told to go elsewhere."""
    lane = FakeLane(tokenizer, step_s=0.03)
    async with serve_http(lane) as server:
        assert (await server.http.get("/ready")).json() == {"status": "ready", "lanes": 1}
        streaming = asyncio.ensure_future(post_stream(server.http, CHAT, {"messages": HELLO}))
        while lane.num_pages_used == 0:
            await asyncio.sleep(0.005)
        draining = asyncio.ensure_future(server.coordinator.drain(5))
        while not (await server.coordinator.stats()).is_draining:
            await asyncio.sleep(0.005)
        ready = await server.http.get("/ready")
        assert (ready.status_code, ready.json()["reason"]) == (503, "draining")
        assert (await server.http.get("/health")).status_code == 200
        assert (await server.http.get("/live")).status_code == 200
        refused = await server.http.post(CHAT, json={"messages": HELLO})
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert refused.json()["error"]["code"] == "not_serving"
        assert (await streaming)[-1].data == "[DONE]"
        assert await draining


async def test_without_lanes_or_coordinator_it_lives_and_serves_nothing(
    serve_http: ServeHttp, tokenizer: Tokenizer
) -> None:
    lane = FakeLane(tokenizer)
    async with serve_http(lane) as server:
        lane.die("gone")
        while (await server.http.get("/ready")).json().get("reason") != "no lane is left":
            await asyncio.sleep(0.005)
        for path in ("/ready", "/health"):
            response = await server.http.get(path)
            assert (response.status_code, response.json()["reason"]) == (503, "no lane is left")
        await server.coordinator.stop()
        for path in ("/ready", "/health"):
            assert (await server.http.get(path)).status_code == 503
        assert (await server.http.get("/live")).status_code == 200
        assert "k2dist_http_requests_running" in (await server.http.get("/metrics")).text
        response = await server.http.post(CHAT, json={"messages": HELLO})
        assert response.status_code == 503


async def test_health_is_red_while_work_makes_no_step(
    serve_http: ServeHttp, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coordinator_actor, "stall_s", lambda config: 0.05)
    lane = FakeLane(tokenizer, step_s=0.001)
    async with serve_http(lane) as server:
        assert (await server.http.get("/health")).status_code == 200
        lane._step_s = 2.0  # a collective that hangs
        asking = asyncio.ensure_future(server.http.post(CHAT, json={"messages": HELLO}))
        while (response := await server.http.get("/health")).status_code == 200:
            await asyncio.sleep(0.01)
        assert response.status_code == 503
        assert response.json()["reason"].startswith("lane 0 has work and made no step for")
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)


async def test_metrics_count_what_was_done(serve_http: ServeHttp, tokenizer: Tokenizer) -> None:
    async with serve_http(FakeLane(tokenizer, step_s=0.001)) as server:
        body = {"messages": HELLO, "n": 2}
        response = (await server.http.post(CHAT, json=body)).json()
        await post_stream(server.http, CHAT, {"messages": HELLO, "max_tokens": 3})
        await server.http.post(CHAT, json={"messages": []})
        reply = await server.http.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain")
    found: dict[tuple[str, ...], float] = {}
    for family in text_string_to_metric_families(reply.text):
        for sample in family.samples:
            assert sample.labels["model_name"] == "tiny"
            labels = (value for name, value in sorted(sample.labels.items()) if name != "model_name")
            found[(sample.name, *labels)] = sample.value
    num_prompt = response["usage"]["prompt_tokens"]
    assert found["k2dist_prompt_tokens_total",] == 2 * num_prompt
    assert found["k2dist_generation_tokens_total",] == 2 * 27 + 3
    assert found["k2dist_request_success_total", "stop"] == 2
    assert found["k2dist_request_success_total", "length"] == 1
    assert found["k2dist_time_to_first_token_seconds_count",] == 2
    # The first event of an output may bring several tokens.
    assert 40 < found["k2dist_inter_token_latency_seconds_count",] <= 2 * 26 + 2
    assert found["k2dist_e2e_request_latency_seconds_count",] == 2
    assert found["k2dist_http_requests_total", "openai", "success"] == 2
    assert found["k2dist_http_requests_total", "openai", "error"] == 1
    assert found["k2dist_num_requests_running", "0"] == 0
    assert found["k2dist_kv_cache_usage_perc", "0"] == 0
    assert found["k2dist_lane_steps_total", "0"] > 27
    assert found["k2dist_num_requests_queued",] == 0
