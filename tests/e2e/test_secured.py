"""A cluster with certificates and keys, through the real path; its logs; and its end while it answers."""

from __future__ import annotations

import asyncio
import signal
import ssl
from pathlib import Path

import httpx
import pytest

from k2dist._proto.v1 import control_pb2
from k2dist.cluster.ray_host import HostProcess
from k2dist.errors import UnavailableError
from k2dist.service.answer_events import AnswerEnd, Delta, Finished
from k2dist.service.client import AsyncClient
from k2dist.service.client_request import ClientRequest, PartialSampling
from k2dist.service.new_key import add_key
from k2dist.service.tls import ClientTls
from tests.e2e.command import Command, write_config
from tests.service.certificates import Authority

CANARY = "canaryinthecoalmine"
LONG = PartialSampling(temperature=0.0, max_tokens=900, ignore_eos=True)


def test_a_secured_cluster_serves_and_drains(
    ray_host: HostProcess, tmp_path: Path, tiny_model_dir: Path
) -> None:
    authority = Authority(tmp_path)
    pair = authority.issue("server", "127.0.0.1")
    keys = tmp_path / "keys.yaml"
    key = add_key(keys, tenant="a")
    tls = f"{{cert: {pair.cert}, key: {pair.key}, ca: {authority.ca}, client_ca: {authority.ca}}}"
    service = f"{{grpc: '127.0.0.1:0', http: '127.0.0.1:0', api_keys: {keys}, tls: {tls}}}"
    config = write_config(
        tmp_path,
        "secured",
        service=service,
        deadlines="{start_s: 90, call_s: 30, drain_s: 60, stop_s: 5}",
    )
    arguments = ("serve", config, "--model", tiny_model_dir, "--json")
    with Command(*arguments, ray_address=ray_host.address) as command:
        served = command.line()
        asyncio.run(
            use(served, authority, ClientTls(ca=authority.ca, cert=pair.cert, key=pair.key), key, command)
        )
        assert command.wait() == 0, command.errors()
        said = command.errors() + command.output()
    logs = "".join(path.read_text(errors="replace") for path in Path(ray_host.log_dir).rglob("*.*"))
    assert "k2dist" in logs, "there is something to look through"
    for word in (CANARY, key.split("_", 2)[2]):
        assert word not in said
        assert word not in logs


async def use(
    served: dict[str, str], authority: Authority, tls: ClientTls, key: str, command: Command
) -> None:
    context = ssl.create_default_context(cafile=authority.ca)
    assert tls.cert is not None
    context.load_cert_chain(tls.cert, tls.key)
    async with (
        httpx.AsyncClient(base_url=f"https://{served['http']}", verify=context, timeout=30) as http,
        AsyncClient(served["address"], tls=tls, api_key=key) as client,
    ):
        assert (await http.get("/ready")).status_code == 200  # the gateway's own key and certificate
        assert (await http.get("/v1/models")).status_code == 401
        body = {"prompt": CANARY, "max_tokens": 3}
        answer = await http.post("/v1/completions", json=body, headers={"x-api-key": key})
        assert answer.status_code == 200, answer.text
        change = (await anext(client.watch())).change
        assert [rank.state for rank in change.ranks] == [control_pb2.RANK_STATE_JOINED]
        await end_while_it_answers(client, command)


async def end_while_it_answers(client: AsyncClient, command: Command) -> None:
    """SIGTERM: no new work, and what was accepted is answered to its end."""
    events = client.generate(ClientRequest(prompt=CANARY, sampling=LONG))
    seen = [await anext(events) for _ in range(3)]
    command.process.send_signal(signal.SIGTERM)
    async for change in client.watch():
        if change.change.state == control_pb2.SERVICE_STATE_DRAINING:
            break
    with pytest.raises(UnavailableError, match="draining"):
        await anext(client.generate(ClientRequest(prompt="b")))
    seen += [event async for event in events]
    assert isinstance(seen[-1], Finished)
    assert seen[-1].reason is AnswerEnd.LENGTH
    assert sum(len(event.token_ids) for event in seen if isinstance(event, Delta)) == 900
