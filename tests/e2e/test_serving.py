"""A cluster of four processes, served through the real path: command line, Ray, gloo, gRPC."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from k2dist.cluster.ray_host import HostProcess
from k2dist.config import read_architecture
from k2dist.engine import LocalWorld
from k2dist.messages import Sampling
from k2dist.parallel import first_layout
from k2dist.scheduler import Limits
from k2dist.service.answer_events import Accepted, AnswerEnd, Delta, Finished
from k2dist.service.client import AsyncClient
from k2dist.service.client_request import ClientRequest, PartialSampling
from tests.e2e.command import Command, actors_of, await_that, write_config

PROMPTS = [(5, 17, 99), tuple(range(3, 70)), (200, 1), tuple(range(40, 0, -3))]
NUM_TOKENS = 12
STEP_S = 20.0  # health turns red at half of it
GREEDY = PartialSampling(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)


@pytest.fixture(scope="module")
def config_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("configs")


@pytest.fixture(scope="module")
def served(ray_host: HostProcess, tiny_model_dir: Path, config_dir: Path) -> Iterator[dict[str, Any]]:
    """Two lanes x tp 2; what `serve --json` says of it."""
    sections = {
        "parallel": "{lanes: 2, tp: 2}",
        "ranks": "{rank_cpus: 0.25}",
        "network": "{address: node}",
        "service": "{grpc: '127.0.0.1:0', http: '127.0.0.1:0', retain_s: 60}",
        "deadlines": f"{{start_s: 90, call_s: 30, drain_s: 5, stop_s: 5, step_s: {STEP_S}}}",
    }
    config = write_config(config_dir, "two-by-two", **sections)
    arguments = ("serve", config, "--model", tiny_model_dir, "--json")
    with Command(*arguments, ray_address=ray_host.address) as command:
        yield command.line()
        command.process.send_signal(signal.SIGTERM)
        assert command.wait() == 0, command.errors()
    await_that(lambda: not actors_of(ray_host.mark.pid, "RankActor"), "ranks outlive their cluster")


async def generate(client: AsyncClient, prompt: tuple[int, ...], times: list[float]) -> list[int]:
    """The answer's tokens; when each event with tokens came is added to `times`."""
    token_ids: list[int] = []
    async for event in client.generate(ClientRequest(prompt=prompt, sampling=GREEDY)):
        if isinstance(event, Delta):
            assert event.first_index == len(token_ids), "gapless"
            token_ids += event.token_ids
            times.append(time.monotonic())
        elif isinstance(event, Finished):
            assert event.reason is AnswerEnd.LENGTH
            assert event.usage.completion_tokens == len(token_ids)
    return token_ids


def test_four_processes_generate_what_threads_do(served: dict[str, Any], tiny_model_dir: Path) -> None:
    """And they do so together: each request gets the tokens it gets alone, as they join one by one."""

    async def all_at_once() -> tuple[list[list[int]], list[list[float]]]:
        times: list[list[float]] = [[] for _ in PROMPTS]
        async with AsyncClient(served["address"]) as client:

            async def join_late(index: int) -> list[int]:
                await asyncio.sleep(0.2 * index)
                return await generate(client, PROMPTS[index], times[index])

            return await asyncio.gather(*(join_late(index) for index in range(len(PROMPTS)))), times

    tokens, times = asyncio.run(all_at_once())
    layout = first_layout(read_architecture(tiny_model_dir), lanes=2, tp=2)
    limits = Limits(step_tokens=64, chunk_tokens=32, max_running=8, max_waiting=32)
    with LocalWorld(tiny_model_dir, layout, limits=limits, page_tokens=16, num_pages=64) as world:
        for prompt, served_ids in zip(PROMPTS, tokens, strict=True):
            (alone,) = world.generate(
                [prompt], Sampling(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
            )
            assert served_ids == alone.token_ids
    assert times[1][0] < times[0][-1], "the second joined while the first decoded"
    assert all(len(arrived) > 2 for arrived in times), "tokens came as they were made"


def test_ranks_are_processes_in_their_places(served: dict[str, Any], ray_host: HostProcess) -> None:
    pids = [rank["pid"] for rank in served["ranks"]]
    assert [rank["world_rank"] for rank in served["ranks"]] == [0, 1, 2, 3]
    assert sorted(pids) == sorted(process.pid for process in actors_of(ray_host.mark.pid, "RankActor"))
    for progress in (rank["progress"] for rank in served["ranks"]):
        assert progress["num_bytes_loaded"] == progress["num_bytes_tested"] == progress["num_bytes"] > 0


def test_a_client_that_leaves_frees_its_pages(served: dict[str, Any]) -> None:
    async def leave_early() -> None:
        async with AsyncClient(served["address"]) as client:
            endless = PartialSampling(temperature=0.0, max_tokens=900, ignore_eos=True)
            events = client.generate(ClientRequest(prompt=(1, 2, 3), sampling=endless))
            seen = [await anext(events) for _ in range(3)]
            assert isinstance(seen[-1], Delta)
            lanes = (await client.topology()).lanes
            assert sum(lane.num_running for lane in lanes) == 1
            await events.aclose()
            give_up_s = time.monotonic() + 5.0
            while any(lane.num_pages_free < lane.num_pages for lane in (await client.topology()).lanes):
                assert time.monotonic() < give_up_s, "the pages did not come home"
                await asyncio.sleep(0.02)

    asyncio.run(leave_early())


def test_a_rank_that_stands_still_is_named_and_may_go_on(served: dict[str, Any]) -> None:
    """SIGSTOP: it answers nothing. Health is red at half of the step's deadline; then it heals."""
    stopped = served["ranks"][3]

    async def stop_one() -> None:
        async with AsyncClient(served["address"]) as client, httpx.AsyncClient(timeout=15) as http:
            url = f"http://{served['http']}"
            assert (await http.get(f"{url}/health")).status_code == 200
            endless = PartialSampling(temperature=0.0, max_tokens=200, ignore_eos=True)
            events = client.generate(ClientRequest(request_id="stood", prompt=(1, 2, 3), sampling=endless))
            assert [type(await anext(events)) for _ in range(2)] == [Accepted, Delta]
            process = psutil.Process(stopped["pid"])
            process.suspend()
            began_s = time.monotonic()
            try:
                while (health := await http.get(f"{url}/health")).json().get("late_ranks") != [3]:
                    # The first red may rest on what busy ranks said up to a second before.
                    assert time.monotonic() - began_s < STEP_S / 2 + 4, f"rank 3 hangs: {health.text}"
                    await asyncio.sleep(0.1)
                assert health.status_code == 503
                assert "rank 3 is late: ranks 0, 1, 2 waited " in health.json()["reason"]
                metrics = (await http.get(f"{url}/metrics")).text.splitlines()
                late = [line for line in metrics if line.startswith("k2dist_rank_late{")]
                assert [line[-14:] for line in late if line.endswith("1.0")] == [',rank="3"} 1.0']
            finally:
                process.resume()
            rest = [event async for event in events]
            assert isinstance(rest[-1], Finished), "the step was late, and not given up"
            assert (await http.get(f"{url}/health")).status_code == 200
            trace = await client.observe.trace("stood")
            assert (trace.outputs[0].num_tokens, trace.outputs[0].finish) == (200, "length")
            cluster = (await http.get(f"{url}/v1/cluster")).json()
            assert [rank["state"] for rank in cluster["ranks"]] == ["joined"] * 4
            assert all(sum(rank["expert_rows"]) > 0 and rank["wait_s"] > 0 for rank in cluster["ranks"])

    asyncio.run(stop_one())


def test_a_second_cluster_of_the_name_is_refused(
    served: dict[str, Any], ray_host: HostProcess, tiny_model_dir: Path, config_dir: Path, tmp_path: Path
) -> None:
    """By Ray, where the two are started on different machines; here, with different records."""
    arguments = ("serve", config_dir / "two-by-two.yaml", "--model", tiny_model_dir)
    with Command(*arguments, ray_address=ray_host.address, TMPDIR=str(tmp_path)) as command:
        assert command.wait() == 1
        assert "'two-by-two' runs in this Ray already" in command.error_line()
