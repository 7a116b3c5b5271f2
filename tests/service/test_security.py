"""TLS, mTLS and API keys on both servers, as clients meet them; and what stays out of the logs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import anthropic
import grpc
import httpx
import openai
import pytest
from google.rpc import error_details_pb2, status_pb2
from msgspec.structs import replace

from k2dist._proto.v1 import control_pb2, control_pb2_grpc, inference_pb2_grpc
from k2dist._proto.v1 import inference_pb2 as pb
from k2dist.config.cluster import ClusterConfig, TlsConfig
from k2dist.errors import ConfigError, UnavailableError
from k2dist.messages import ChatMessage
from k2dist.service.answer_events import Accepted, AnswerEvent, Delta
from k2dist.service.client import AsyncClient
from k2dist.service.client_request import ClientRequest, PartialSampling
from k2dist.service.coordinator_actor import CoordinatorActor
from k2dist.service.error_codes import (
    DETAILS_KEY,
    ForbiddenError,
    RateLimitError,
    UnauthenticatedError,
    UnknownRequestError,
)
from k2dist.service.gateway_actor import GatewayActor
from k2dist.service.new_key import add_key
from k2dist.service.tls import ClientTls
from k2dist.text.tokenizer import Tokenizer
from tests.service.certificates import Authority, Pair
from tests.service.fake_lane import FakeLane
from tests.service.http_clients import HELLO

CHAT = {"model": "tiny", "messages": HELLO}
MESSAGES = {"model": "tiny", "messages": HELLO, "max_tokens": 5}
SHORT = PartialSampling(max_tokens=5)


@dataclass(frozen=True)
class Served:
    grpc: str
    http: str
    coordinator: CoordinatorActor


@asynccontextmanager
async def served(
    config: ClusterConfig, model_dir: Path, *lanes: FakeLane, **service: object
) -> AsyncIterator[Served]:
    """Coordinator and gateway of one cluster, which share a key as the supervisor gives it."""
    config = replace(config, service=replace(config.service, **service))
    coordinator = CoordinatorActor(config, model_dir, lanes, inner_key="inner-secret-of-the-gateway")
    gateway = GatewayActor(config, "inner-secret-of-the-gateway")
    address = await coordinator.start()
    for lane in lanes:
        lane.start()
    try:
        yield Served(address, await gateway.start(address, "127.0.0.1:0"), coordinator)
    finally:
        await gateway.stop()
        await coordinator.stop()
        for lane in lanes:
            await lane.stop()


async def read(events: AsyncIterator[AnswerEvent]) -> list[AnswerEvent]:
    return [event async for event in events]


def text_of(events: list[AnswerEvent]) -> str:
    return "".join(event.text for event in events if isinstance(event, Delta))


# -- TLS -----------------------------------------------------------------------------------------------------


def tls_of(authority: Authority, pair: Pair, **more: str) -> TlsConfig:
    return TlsConfig(cert=pair.cert, key=pair.key, ca=authority.ca, **more)


async def test_both_servers_speak_tls_and_only_that(
    config: ClusterConfig, model_dir: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    authority, stranger = Authority(tmp_path), Authority(tmp_path, "stranger")
    tls = tls_of(authority, authority.issue("server", "127.0.0.1"))
    async with served(config, model_dir, FakeLane(tokenizer), tls=tls) as at:
        async with AsyncClient(at.grpc, tls=ClientTls(ca=authority.ca)) as client:
            assert len(await read(client.generate(ClientRequest(prompt="a")))) > 2
        for wrong in (None, ClientTls(ca=stranger.ca), ClientTls(ca=authority.ca, name="other.example")):
            async with AsyncClient(at.grpc, tls=wrong) as client:
                with pytest.raises(UnavailableError, match="is it running" if wrong else "speak TLS"):
                    await client.models()
        async with httpx.AsyncClient(base_url=f"https://{at.http}", verify=context(authority)) as http:
            assert (await http.post("/v1/chat/completions", json=CHAT)).status_code == 200
            assert (await http.get("/ready")).status_code == 200
        with pytest.raises(httpx.ConnectError):
            async with httpx.AsyncClient(verify=context(stranger)) as http:
                await http.get(f"https://{at.http}/live")
        with pytest.raises(httpx.RemoteProtocolError):
            async with httpx.AsyncClient() as http:
                await http.get(f"http://{at.http}/live")


async def test_mtls_lets_in_who_shows_a_certificate(
    config: ClusterConfig, model_dir: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    authority, stranger = Authority(tmp_path), Authority(tmp_path, "stranger")
    tls = tls_of(authority, authority.issue("server", "127.0.0.1"), client_ca=authority.ca)
    ours, theirs = authority.issue("client", "someone"), stranger.issue("bad", "someone")
    async with served(config, model_dir, FakeLane(tokenizer), tls=tls) as at:  # its gateway is let in too
        known = ClientTls(ca=authority.ca, cert=ours.cert, key=ours.key)
        async with AsyncClient(at.grpc, tls=known) as client:
            assert [model.name for model in await client.models()] == ["tiny"]
        for wrong in (
            ClientTls(ca=authority.ca),
            ClientTls(ca=authority.ca, cert=theirs.cert, key=theirs.key),
        ):
            async with AsyncClient(at.grpc, tls=wrong) as client:
                with pytest.raises(UnavailableError):
                    await client.models()
        async with httpx.AsyncClient(verify=context(authority, ours)) as http:
            assert (await http.get(f"https://{at.http}/v1/models")).status_code == 200
        for pair in (None, theirs):
            with pytest.raises((httpx.ReadError, httpx.RemoteProtocolError, httpx.ConnectError)):
                async with httpx.AsyncClient(verify=context(authority, pair)) as http:
                    await http.get(f"https://{at.http}/live")


def context(authority: Authority, pair: Pair | None = None) -> object:
    import ssl

    found = ssl.create_default_context(cafile=authority.ca)
    if pair is not None:
        found.load_cert_chain(pair.cert, pair.key)
    return found


async def test_new_certificates_are_taken_without_a_restart(
    config: ClusterConfig,
    model_dir: Path,
    tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("k2dist.service.watched._LOOK_S", 0.0)
    old, new = Authority(tmp_path, "old"), Authority(tmp_path, "new")
    pair = old.issue("server", "127.0.0.1")
    tls = tls_of(old, pair)

    async def works(authority: Authority, at: Served) -> bool:
        async with AsyncClient(at.grpc, tls=ClientTls(ca=authority.ca)) as client:
            try:
                await client.models()
            except UnavailableError:
                is_grpc = False
            else:
                is_grpc = True
        async with httpx.AsyncClient(verify=context(authority)) as http:
            try:
                await http.get(f"https://{at.http}/live")
            except httpx.ConnectError:
                return is_grpc
        assert is_grpc, "HTTP has another certificate than gRPC"
        return True

    async with served(config, model_dir, FakeLane(tokenizer), tls=tls) as at:
        assert await works(old, at)
        Path(pair.cert).write_text("half a cert")  # a broken one: the old stays in force, and it is said
        assert await works(old, at)
        assert f"{pair.cert!r}" in caplog.text
        new.issue("server", "127.0.0.1")
        assert await works(new, at)
        assert not await works(old, at)


async def test_files_that_cannot_be_used_are_named(
    config: ClusterConfig, model_dir: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    authority = Authority(tmp_path)
    pair, other = authority.issue("server", "a"), authority.issue("other", "b")
    text = tmp_path / "text.pem"
    text.write_text("no PEM")
    wrong = {
        r"service\.tls\.cert='.*nothing'.*cannot be read": tls_of(authority, Pair("nothing", pair.key)),
        r"service\.tls\.key='.*nothing'.*cannot be read": tls_of(authority, Pair(pair.cert, "nothing")),
        r"service\.tls\.key='.*other.key': is not the key of": tls_of(authority, Pair(pair.cert, other.key)),
        r"service\.tls\.cert='.*text.pem'.*not PEM": tls_of(authority, Pair(str(text), pair.key)),
        r"service\.tls\.client_ca='.*text.pem'.*no certificates": tls_of(
            authority, pair, client_ca=str(text)
        ),
    }
    for message, tls in wrong.items():
        changed = replace(config, service=replace(config.service, tls=tls))
        with pytest.raises(ConfigError, match=message):
            await CoordinatorActor(changed, model_dir, [FakeLane(tokenizer)]).start()
    with pytest.raises(ConfigError, match=r"ca='.*text.pem': holds no certificates"):
        AsyncClient("127.0.0.1:1", tls=ClientTls(ca=str(text)))


# -- API keys ------------------------------------------------------------------------------------------------


async def test_without_a_key_nothing_is_answered_but_health(
    config: ClusterConfig, model_dir: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    keys = tmp_path / "keys.yaml"
    key = add_key(keys, tenant="a")
    async with served(config, model_dir, FakeLane(tokenizer), api_keys=str(keys)) as at:
        for wrong in ("", key[:-1], "inner-secret"):
            async with AsyncClient(at.grpc, api_key=wrong) as client:
                for call in (client.models(), client.topology(), client.tokenize("x"), client.abort("r")):
                    with pytest.raises(UnauthenticatedError):
                        await call
                with pytest.raises(UnauthenticatedError):
                    await read(client.generate(ClientRequest(prompt="a")))
                with pytest.raises(UnauthenticatedError):
                    await read(client.resume("r"))
        async with AsyncClient(at.grpc, api_key=key) as client:
            assert len(await read(client.generate(ClientRequest(prompt="a")))) > 2
        async with httpx.AsyncClient(base_url=f"http://{at.http}") as http:
            for path in ("/live", "/ready", "/health"):
                assert (await http.get(path)).status_code == 200
            for path in ("/v1/models", "/metrics", "/openapi.json", "/nowhere"):
                assert (await http.get(path)).status_code == 401, path
            refused = await http.post("/v1/chat/completions", content=b"{" * 100)  # before it is read
            assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
            assert refused.headers["www-authenticate"] == "Bearer"
            assert (await http.post("/v1/messages", json=MESSAGES)).json()["error"]["type"] == (
                "authentication_error"
            )
            for headers in ({"authorization": f"Bearer {key}"}, {"x-api-key": key}):
                assert (await http.post("/v1/messages", json=MESSAGES, headers=headers)).status_code == 200
                assert (await http.get("/metrics", headers=headers)).status_code == 403
            monitor = {"x-api-key": add_key(keys, tenant="ops", role="monitor")}
            await asyncio.sleep(1.1)  # until the file is looked at again
            assert (await http.get("/metrics", headers=monitor)).status_code == 200
            forbidden = await http.post("/v1/chat/completions", json=CHAT, headers=monitor)
            assert (forbidden.status_code, forbidden.json()["error"]["code"]) == (403, "forbidden")


async def test_official_clients_meet_refusals_they_know(
    config: ClusterConfig, model_dir: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    keys = tmp_path / "keys.yaml"
    key = add_key(keys, tenant="a", requests_per_minute=2)
    async with served(config, model_dir, FakeLane(tokenizer), api_keys=str(keys)) as at:
        url = f"http://{at.http}"
        with_openai = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
        with_anthropic = anthropic.AsyncAnthropic(base_url=url, api_key=key, max_retries=0)
        nobody = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0)
        async with with_openai, with_anthropic, nobody:
            answer = await with_openai.chat.completions.create(model="tiny", messages=HELLO)
            assert answer.choices[0].message.content
            assert (await with_anthropic.messages.create(**MESSAGES)).content
            with pytest.raises(openai.RateLimitError) as caught:
                await with_openai.chat.completions.create(model="tiny", messages=HELLO)
            assert 1 <= int(caught.value.response.headers["retry-after"]) <= 31
            assert caught.value.code == "rate_limit_exceeded"
            with pytest.raises(anthropic.RateLimitError) as also_caught:
                await with_anthropic.messages.create(**MESSAGES)
            assert 1 <= int(also_caught.value.response.headers["retry-after"]) <= 31
            with pytest.raises(openai.AuthenticationError):
                await nobody.models.list()


async def test_limits_priorities_and_tenants_are_the_keys(
    config: ClusterConfig, model_dir: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    keys = tmp_path / "keys.yaml"
    key = add_key(keys, tenant="a", tokens_per_minute=6, max_priority=1)
    lane = FakeLane(tokenizer)
    async with (
        served(config, model_dir, lane, api_keys=str(keys)) as at,
        AsyncClient(at.grpc, api_key=key) as client,
        grpc.aio.insecure_channel(at.grpc) as channel,
    ):
        for wrong in (ClientRequest(prompt="a", priority=2), ClientRequest(prompt="a", tenant="b")):
            with pytest.raises(ForbiddenError):
                await read(client.generate(wrong))
        request = ClientRequest(prompt="ab", priority=1, request_id="r", sampling=SHORT)
        assert isinstance((await read(client.generate(request)))[0], Accepted)  # 7 tokens of 6: in debt
        with pytest.raises(RateLimitError) as caught:
            await read(client.generate(ClientRequest(prompt="a")))
        assert 15 < caught.value.retry_after_s <= 20.5  # 2 tokens, at one in 10 s
        assert len(await read(client.generate(request))) > 2  # to attach is free
        assert len(await read(client.resume("r"))) > 2
        stub = inference_pb2_grpc.InferenceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as raw:
            await anext(aiter(stub.Generate(pb.GenerateRequest(text="a"), metadata=[("x-api-key", key)])))
        assert raw.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        status = status_pb2.Status.FromString(raw.value.trailing_metadata()[DETAILS_KEY])
        retry = error_details_pb2.RetryInfo()
        assert any(detail.Unpack(retry) for detail in status.details)
        assert 15 < retry.retry_delay.ToTimedelta().total_seconds() <= 20.5


async def test_a_request_belongs_to_its_key(
    config: ClusterConfig, model_dir: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    keys = tmp_path / "keys.yaml"
    mine, theirs = add_key(keys, tenant="a"), add_key(keys, tenant="a")  # even of the same tenant
    lane = FakeLane(tokenizer, step_s=0.005)
    async with (
        served(config, model_dir, lane, api_keys=str(keys)) as at,
        AsyncClient(at.grpc, api_key=mine) as me,
        AsyncClient(at.grpc, api_key=theirs) as they,
    ):
        request = ClientRequest(prompt="a", request_id="r", detached=True)
        events = me.generate(request)
        accepted = await anext(events)
        assert isinstance(accepted, Accepted)
        assert accepted.request_id == "r"
        with pytest.raises(UnknownRequestError, match="'r' is not known"):
            await read(they.resume("r"))
        assert (await they.abort("r")).result == pb.AbortResponse.RESULT_NOT_FOUND
        other = await read(they.generate(ClientRequest(prompt="bc", request_id="r")))  # their own r
        assert isinstance(other[0], Accepted)
        rest = [event async for event in events]
        assert text_of(await read(me.resume("r"))) == text_of(rest) != ""
        assert (await me.observe.trace("r")).request_id == "r", "not what it is called inside"
        with pytest.raises(UnknownRequestError, match="'other' is not known"):
            await they.observe.trace("other")
        assert (await they.observe.trace("r")).num_prompt_tokens == 2, "their own r"
        assert (await me.abort("r")).result == pb.AbortResponse.RESULT_ALREADY_FINISHED
        assert not lane.cancelled


async def test_tenants_do_not_find_each_others_prompts(
    config: ClusterConfig, model_dir: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    keys = tmp_path / "keys.yaml"
    clients = [add_key(keys, tenant=tenant) for tenant in ("a", "a", "b")]
    cached = []
    async with served(config, model_dir, FakeLane(tokenizer), api_keys=str(keys)) as at:
        for key in clients:
            async with AsyncClient(at.grpc, api_key=key) as client:
                events = await read(client.generate(ClientRequest(prompt="x" * 40, sampling=SHORT)))
                cached.append(events[-1].usage.cached_tokens)
    assert cached == [0, 32, 0]


async def test_draining_takes_an_operators_key(
    config: ClusterConfig, model_dir: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    keys = tmp_path / "keys.yaml"
    key = add_key(keys, tenant="a")
    operator = add_key(keys, tenant="ops", role="operator")
    lane = FakeLane(tokenizer, step_s=0.01)
    async with (
        served(config, model_dir, lane, api_keys=str(keys)) as at,
        AsyncClient(at.grpc, api_key=key) as client,
        AsyncClient(at.grpc, api_key=operator) as ops,
        grpc.aio.insecure_channel(at.grpc) as channel,
    ):
        stub = control_pb2_grpc.ControlStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Drain(control_pb2.DrainRequest(), metadata=[("authorization", f"Bearer {key}")])
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
        events = client.generate(ClientRequest(prompt="a"))
        await anext(events)
        assert not (await ops.drain(timeout_s=0.05)).is_drained  # it goes on
        with pytest.raises(UnavailableError, match="draining"):
            await read(client.generate(ClientRequest(prompt="b")))
        draining = asyncio.ensure_future(ops.drain())
        assert len(await read(events)) > 20
        response = await draining
        assert (response.is_drained, response.live_outputs) == (True, 0)


async def test_logs_hold_neither_prompts_nor_keys(
    config: ClusterConfig,
    model_dir: Path,
    tokenizer: Tokenizer,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Whatever happens to a request: answered, refused, broken off by a lane's death, aborted."""
    caplog.set_level(logging.DEBUG)
    keys = tmp_path / "keys.yaml"
    key = add_key(keys, tenant="a", requests_per_minute=7)
    canary = "canary-in-the-prompt"
    secret = key.split("_", 2)[2]
    lanes = (FakeLane(tokenizer, lane=0), FakeLane(tokenizer, lane=1, step_s=0.005))
    async with served(config, model_dir, *lanes, api_keys=str(keys)) as at:
        headers = {"authorization": f"Bearer {key}"}
        async with (
            httpx.AsyncClient(base_url=f"http://{at.http}", headers=headers) as http,
            AsyncClient(at.grpc, api_key=key) as client,
        ):
            asked = {"model": "tiny", "messages": [{"role": "user", "content": canary}]}
            for body in (asked, asked | {"model": canary}, asked | {"stop": [""]}, asked | {canary: 1}):
                await http.post("/v1/chat/completions", json=body)
                await http.post("/v1/messages", json=body | {"max_tokens": 5})
            await http.post("/v1/chat/completions", content=canary)
            await http.get(f"/v1/models/{canary}")
            message = ChatMessage(role="user", content=canary)
            for _ in range(8):
                with suppress(RateLimitError):
                    await read(client.chat([message]))
        async with AsyncClient(at.grpc, api_key=key[:-1]) as client:
            with pytest.raises(UnauthenticatedError):
                await read(client.chat([message]))
        for lane in lanes:
            lane.die("it died")
        await asyncio.sleep(0.05)
    servers = [record for record in caplog.records if not record.name.startswith(("httpx", "httpcore"))]
    said = "\n".join(map(logging.Formatter().format, servers)) + "".join(capfd.readouterr())
    assert "coordinator.lane_lost" in said  # the logs are there
    for word in (canary, secret, "inner-secret-of-the-gateway"):
        assert word not in said
