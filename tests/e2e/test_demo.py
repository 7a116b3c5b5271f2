"""`k2dist demo` from the command to the exit code, with the committed model; what it left, by its APIs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import anthropic
import httpx
import psutil
import pytest
from openai import OpenAI

from k2dist.cli.chat import run_demo_tool
from k2dist.demo.chats import GrpcChat
from k2dist.demo.corpus import WHO
from k2dist.demo.evaluate import failures, held_out_cases, run_cases
from k2dist.demo.tools import declaration
from k2dist.messages import ToolCall
from tests.e2e.command import Command, await_that
from tests.e2e.http_talks import anthropic_tool_loop, read_chunks, text_of, tool_call_with_client

MAX_PSS_BYTES = 3 * 2**30


@dataclass(frozen=True)
class Kept:
    """What `demo --keep --json` printed, and the memory of all its processes then."""

    report: dict[str, Any]
    pss_bytes: int
    processes: list[psutil.Process]

    @property
    def url(self) -> str:
        return f"http://{self.report['http']}"


@pytest.fixture(scope="module")
def kept() -> Iterator[Kept]:
    """A demo that was left serving; it is stopped, and nothing of it stays."""
    with Command("demo", "--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0", "--keep", "--json") as command:
        report = command.line()
        pss_bytes = sum(process.memory_full_info().pss for process in command.living())
        assert command.wait() == 0, command.errors()
        ranks = [process for process in command.living() if process.name().startswith("ray::RankActor")]
        assert len(ranks) == 4, "they outlive their driver"
        yield Kept(report, pss_bytes, command.living())
        command.note_tree()
        with Command("stop", "--name", "laptop", "--json") as stop:
            assert stop.line() == {"ended": "laptop"}
            assert stop.wait() == 0
        await_that(lambda: command.living() == [], f"left: {command.living()}")
    with Command("stop", "--name", "laptop") as again:
        assert again.wait() == 2
        assert "'laptop' is not running" in again.error_line()


def test_the_demo_shows_what_ran_where(kept: Kept) -> None:
    report = kept.report
    assert report["is_left_running"]
    assert [talk["name"] for talk in report["talks"]] == ["who", "capital", "weather"]
    assert all(0 < talk["first_token_s"] <= talk["total_s"] for talk in report["talks"])
    assert all(talk["lane"] in (0, 1) and talk["num_tokens"] > 0 for talk in report["talks"])
    assert [(rank["lane"], rank["tp_rank"]) for rank in report["ranks"]] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert sorted(e for rank in report["ranks"] for e in rank["experts"]) == list(range(12))
    assert len({rank["num_steps"] for rank in report["ranks"]}) == 1, "lanes step together"
    assert sum(rank["num_rows_sent"] for rank in report["ranks"]) > 0


def test_all_processes_together_take_less_than_3_gib(kept: Kept) -> None:
    assert 0 < kept.pss_bytes < MAX_PSS_BYTES


def test_the_three_conversations_are_answered(kept: Kept) -> None:
    who, capital, weather = kept.report["talks"]
    assert who["answer"] == WHO
    assert "Rome" in capital["answer"]
    (call,) = weather["tool_calls"]
    assert (call["name"], call["arguments"]) == ("get_weather", '{"city": "Paris"}')
    result = run_demo_tool(ToolCall(**call))
    number = re.search(r"-?\d+(\.\d+)?", result)
    assert number is not None
    assert number[0] in weather["answer"]


def test_twenty_held_out_weather_questions_over_grpc(kept: Kept) -> None:
    outcomes = run_cases(held_out_cases(num_weather=20, num_others=0), GrpcChat(kept.report["address"]))
    assert sum(outcome.is_called is True for outcome in outcomes) >= 19, failures(outcomes)
    assert sum(outcome.is_answered for outcome in outcomes) >= 18, failures(outcomes)  # 95% of 200


def test_the_publishers_example_runs_unmodified(kept: Kept) -> None:
    """But for base_url: the model's own tool loop, with OpenAI's client."""
    client = OpenAI(base_url=f"{kept.url}/v1", api_key="none", max_retries=0)
    (model,) = client.models.list().data
    answer, called = tool_call_with_client(client, model.id, seed=1)
    assert called == [("get_weather", {"city": "Beijing"})]
    assert "sunny" in answer.lower()


def test_anthropics_streaming_tool_loop(kept: Kept) -> None:
    client = anthropic.Anthropic(base_url=kept.url, api_key="none", max_retries=0)
    answer, called = anthropic_tool_loop(client, "model")
    assert called == [("get_weather", {"city": "Beijing"})]
    assert "sunny" in answer.lower()


def test_schemas_and_choices_of_tools_are_enforced(kept: Kept) -> None:
    """What the model would never say by itself, at a temperature that makes it stray."""
    client = OpenAI(base_url=f"{kept.url}/v1", api_key="none", max_retries=0)
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Rome", "Oslo"]}, "degrees": {"type": "integer", "maximum": 9}},
        "required": ["city", "degrees"],
        "additionalProperties": False,
    }
    question: Any = [{"role": "user", "content": "Who are you?"}]
    for seed in range(3):
        common: dict[str, Any] = {"model": "model", "messages": question, "temperature": 1.5, "seed": seed}
        form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema, "strict": True}}
        answer = client.chat.completions.create(**common, max_tokens=200, response_format=form).choices[0]
        if answer.finish_reason == "stop":  # else it was cut, and said so
            found = json.loads(answer.message.content)
            assert found["city"] in ("Rome", "Oslo")
            assert found.keys() == {"city", "degrees"}
            assert found["degrees"] <= 9
        else:
            assert answer.finish_reason == "length"
        tool = dict(declaration("get_weather"))
        forced = client.chat.completions.create(
            **common, max_tokens=300, tools=[tool], tool_choice="required", parallel_tool_calls=False
        ).choices[0]
        if forced.finish_reason == "tool_calls":
            (call,) = forced.message.tool_calls
            assert call.function.name == "get_weather"
            assert isinstance(json.loads(call.function.arguments)["city"], str)
        else:
            assert forced.finish_reason == "length"


@pytest.mark.filterwarnings("ignore")  # theirs
def test_clients_that_stand_on_these(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else its import asks the network
    import litellm
    from langchain_openai import ChatOpenAI

    question = "What is the capital of Italy?"
    chat = ChatOpenAI(model="model", base_url=f"{kept.url}/v1", api_key="none", temperature=0)  # type: ignore[arg-type]
    assert "Rome" in str(chat.invoke(question).content)
    assert "Rome" in "".join(str(chunk.content) for chunk in chat.stream(question))
    messages = [{"role": "user", "content": question}]
    for model, base in (("openai/model", f"{kept.url}/v1"), ("anthropic/model", kept.url)):
        whole = litellm.completion(
            model=model, api_base=base, api_key="none", messages=messages, temperature=0, max_tokens=50
        )
        assert "Rome" in whole.choices[0].message.content


def test_a_gateway_that_dies_is_made_anew_and_its_streams_go_on(kept: Kept) -> None:
    """On the same address; a detached stream is read on from the last event that was seen."""
    url = f"{kept.url}/v1/chat/completions"
    messages = [{"role": "user", "content": "Who are you?"}]
    body = {"messages": messages, "temperature": 0, "stream": True, "detached": True}
    seen = read_chunks(url, body, None, 4)
    (gateway,) = (process for process in kept.processes if process.name().startswith("ray::GatewayActor"))
    gateway.kill()

    def is_back() -> bool:
        try:
            return httpx.get(f"{kept.url}/ready").status_code == 200
        except httpx.TransportError:
            return False

    await_that(is_back, "no gateway came back", timeout_s=60)
    seen += read_chunks(url, body, seen[-1][0], 1000)
    assert seen[-1][1] == "[DONE]"
    assert text_of(seen) == WHO


def test_a_second_cluster_of_the_name_is_refused_at_once(kept: Kept) -> None:
    """Its record could not be told from the first one's."""
    with Command("demo", "--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0") as command:
        assert command.wait() == 1
        assert command.note_tree() == set(), "something was started"
        assert f"'laptop' is running already, at {kept.report['address']}" in command.error_line()
