"""Moonshot's example of a tool loop, with OpenAI's client and the demo model, in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
from openai import OpenAI

from k2dist.config.cluster import CacheConfig, ClusterConfig, ParallelConfig, SchedulerConfig, ServiceConfig
from k2dist.demo import MODEL_DIR
from k2dist.engine import LocalWorld
from k2dist.scheduler import Limits
from tests.e2e.http_talks import QUESTION, WEATHER, tool_call_with_client
from tests.service.http_server import run_http
from tests.service.port_lane import PortLane

SHORT_QUESTION = "What's the weather in Beijing? Use the tool to check."
NUM_SEEDS = 20
CONFIG = ClusterConfig(
    name="test",
    parallel=ParallelConfig(lanes=1, tp=1),
    cache=CacheConfig(page_tokens=64, num_pages=256),
    scheduler=SchedulerConfig(),
    service=ServiceConfig(grpc="127.0.0.1:0"),
)
Talk = tuple[str, str]  # the question, and what the tool says


@pytest.fixture(scope="module")
def world() -> Iterator[LocalWorld]:
    with LocalWorld(MODEL_DIR, limits=Limits(max_waiting=64)) as world:
        yield world


def loop_over_seeds(world: LocalWorld, talks: list[Talk]) -> list[tuple[str, list[object]]]:
    """One loop for every talk, each with its own seed: the answers and calls, in order."""

    async def run() -> list[tuple[str, list[object]]]:
        async with run_http(CONFIG, MODEL_DIR, PortLane(world.ports[0])) as server:
            client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=30)
            loops = [
                partial(tool_call_with_client, client, "model", seed=seed, question=question, result=result)
                for seed, (question, result) in enumerate(talks)
            ]
            # Not in asyncio's own threads: there are six on two cores, and the lane waits in them too.
            with ThreadPoolExecutor(len(loops)) as pool:
                event_loop = asyncio.get_running_loop()
                return await asyncio.gather(*(event_loop.run_in_executor(pool, loop) for loop in loops))

    return asyncio.run(asyncio.wait_for(run(), 60))


@pytest.mark.parametrize("question", [QUESTION, SHORT_QUESTION])
def test_the_final_answer_says_what_the_tool_said(world: LocalWorld, question: str) -> None:
    """At the example's own temperature, 0.6: one seed in twenty may go astray on another CPU's bits."""
    loops = loop_over_seeds(world, [(question, WEATHER)] * NUM_SEEDS)
    right = [
        called == [("get_weather", {"city": "Beijing"})] and "sunny" in answer.lower()
        for answer, called in loops
    ]
    assert sum(right) >= NUM_SEEDS - 1, loops


def test_other_cities_words_and_forms(world: LocalWorld) -> None:
    words = [
        ("Paris", "Cloudy", '{"weather": "Cloudy"}'), ("Cairo", "Windy", '{"weather":"Windy"}'),
        ("Lima", "Sunny", "Sunny"), ("New York", "Foggy", '{"weather": "Foggy"}'),
        ("Oslo", "Heavy snow", '{"city": "Oslo", "weather": "Heavy snow"}'),
        ("Tokyo", "warm", '{"weather": "warm"}'), ("Rome", "light rain", '{"weather": "light rain"}'),
        ("Beijing", "Sunny", "The weather in Beijing is Sunny."),
    ]  # fmt: skip
    talks = [(f"What's the weather in {city}? Use the tool to check.", result) for city, _, result in words]
    loops = loop_over_seeds(world, talks)
    right = [
        called == [("get_weather", {"city": city})] and word in answer
        for (city, word, _), (answer, called) in zip(words, loops, strict=True)
    ]
    assert sum(right) >= len(words) - 1, loops
