"""`k2dist chat` against a running service: from a pipe in this process, on a terminal in its own."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import typer
from msgspec.structs import replace
from typer.testing import CliRunner, Result

from k2dist.cli.chat import chat, run_demo_tool
from k2dist.config.cluster import ClusterConfig, TlsConfig
from k2dist.errors import UnavailableError, UsageError
from k2dist.messages import ToolCall
from k2dist.service.coordinator_actor import CoordinatorActor
from k2dist.service.error_codes import UnauthenticatedError
from k2dist.service.new_key import add_key
from k2dist.text.tokenizer import IM_END, Tokenizer
from tests.service.certificates import Authority
from tests.service.conftest import Serve
from tests.service.fake_lane import FakeLane
from tests.service.test_generate import call_tokens

ALPHABET = "abcdefghijklmnopqrstuvwxyz"
app = typer.Typer()
app.command()(chat)


async def run(address: str, *arguments: str, stdin: str) -> Result:
    return await asyncio.to_thread(CliRunner().invoke, app, ["--address", address, *arguments], input=stdin)


async def test_each_line_of_a_pipe_is_a_message(serve: Serve, tokenizer: Tokenizer) -> None:
    async with serve(FakeLane(tokenizer)) as client:
        result = await run(client.address, stdin="Hello\n\nAgain\n")
    assert result.exception is None
    assert result.stdout == f"{ALPHABET}\n{ALPHABET}\n"


async def test_the_history_is_sent_with_each_message(serve: Serve, tokenizer: Tokenizer) -> None:
    prompts: list[str] = []

    def script(prompt: tuple[int, ...]) -> list[int]:
        prompts.append(tokenizer.decode(prompt))
        return [*b"ok", tokenizer.special_id(IM_END)]

    async with serve(FakeLane(tokenizer, script=script)) as client:
        result = await run(client.address, "--system", "Be brief.", "--json", stdin="one\ntwo\n")
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert [answer["content"] for answer in answers] == ["ok", "ok"]
    assert answers[0]["finish_reason"] == "stop"
    assert answers[0]["usage"]["completion_tokens"] == 3
    assert prompts[0].startswith("<|im_system|>system<|im_middle|>Be brief.<|im_end|><|im_user|>")
    assert "one<|im_end|><|im_assistant|>assistant<|im_middle|>ok<|im_end|>" in prompts[-1]


async def test_demo_tools_are_run_and_shown(serve: Serve, tokenizer: Tokenizer) -> None:
    call = call_tokens(tokenizer, "get_weather", '{"city": "Paris"}')
    prompts: set[str] = set()

    def script(prompt: tuple[int, ...]) -> list[int]:
        text = tokenizer.decode(prompt)
        prompts.add(text)
        return [*b"Fine.", tokenizer.special_id(IM_END)] if "## Return of" in text else call

    async with serve(FakeLane(tokenizer, script=script)) as client:
        result = await run(client.address, "--demo-tools", stdin="Weather in Paris?\n")
    weather = run_demo_tool(ToolCall(id="", name="get_weather", arguments='{"city": "Paris"}'))
    assert result.exception is None
    assert result.stdout == f'Let me look.[get_weather {{"city": "Paris"}}] -> {weather}\nFine.\n'
    assert any(f"## Return of functions.get_weather:0\n{weather}<|im_end|>" in prompt for prompt in prompts)
    assert all("tool_declare" in prompt for prompt in prompts)


async def test_calls_of_given_tools_are_shown_and_not_run(
    serve: Serve, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    tools = tmp_path / "tools.json"
    tools.write_text('[{"type": "function", "function": {"name": "f"}}]')
    call = call_tokens(tokenizer, "f", "{}")
    async with serve(FakeLane(tokenizer, script=lambda _: call)) as client:
        result = await run(client.address, "--tools", str(tools), stdin="go\n")
    assert result.stdout == "Let me look.[f {}]\n"


async def test_it_shows_its_key_and_its_certificate(
    serve: Serve, tokenizer: Tokenizer, config: ClusterConfig, model_dir: Path, tmp_path: Path
) -> None:
    authority = Authority(tmp_path)
    pair = authority.issue("server", "127.0.0.1")
    keys, key_file = tmp_path / "keys.yaml", tmp_path / "key"
    key_file.write_text(add_key(keys, tenant="a"))
    tls = TlsConfig(cert=pair.cert, key=pair.key, ca=authority.ca, client_ca=authority.ca)
    service = replace(config.service, tls=tls, api_keys=str(keys))
    actor = CoordinatorActor(replace(config, service=service), model_dir, [lane := FakeLane(tokenizer)])
    address = await actor.start()
    lane.start()
    try:
        shown = ("--ca", authority.ca, "--cert", pair.cert, "--key", pair.key)
        result = await run(address, *shown, "--api-key-file", str(key_file), stdin="Hello\n")
        assert (result.exception, result.stdout) == (None, f"{ALPHABET}\n")
        assert isinstance((await run(address, *shown, stdin="Hello\n")).exception, UnauthenticatedError)
        assert isinstance((await run(address, stdin="Hello\n")).exception, UnavailableError)
    finally:
        await actor.stop()
        await lane.stop()


async def test_errors_leave_the_command(tmp_path: Path) -> None:
    nobody = await run("127.0.0.1:1", stdin="Hello\n")
    assert isinstance(nobody.exception, UnavailableError)
    no_tools = await run("127.0.0.1:1", "--tools", str(tmp_path / "none"), stdin="")
    assert isinstance(no_tools.exception, UsageError)


def test_a_demo_tool_answers_wrong_calls_with_words() -> None:
    def answer(name: str, arguments: str) -> str:
        return run_demo_tool(ToolCall(id="", name=name, arguments=arguments))

    assert answer("add", '{"a": 17, "b": 25}').find("42") >= 0
    assert answer("add", '{"a": 17, "b": 25}') == answer("add", '{"b": 25, "a": 17}')
    assert answer("nothing", "{}") == "error: there is no tool nothing"
    assert answer("get_weather", "{}").startswith("error: ")
    assert answer("get_weather", "{").startswith("error: ")


async def test_control_c_ends_an_answer_and_control_d_leaves(serve: Serve, tokenizer: Tokenizer) -> None:
    lane = FakeLane(tokenizer, script=lambda _: [ord("a")] * 1000, step_s=0.01)
    async with serve(lane) as client:
        command = "import typer; from k2dist.cli.chat import chat; typer.run(chat)"
        ours, theirs = pty.openpty()
        process = subprocess.Popen(
            [sys.executable, "-c", command, "--address", client.address],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)
        try:
            await read_until(ours, "leaves.\r\n> ")
            os.write(ours, b"Hello\n")
            await read_until(ours, "aaa")
            process.send_signal(signal.SIGINT)
            await read_until(ours, "(ended)\r\n> ")
            while len(lane.cancelled) < 1 or lane.num_pages_used:
                await asyncio.sleep(0.01)
            os.write(ours, b"Again\n")
            await read_until(ours, "aaa")
            process.send_signal(signal.SIGINT)
            await read_until(ours, "(ended)\r\n> ")
            os.write(ours, b"\x04")
            assert await asyncio.to_thread(process.wait, 10) == 0
        finally:
            process.kill()
            process.wait()
            os.close(ours)


async def read_until(fd: int, text: str) -> None:
    seen = ""
    while text not in seen:
        seen += (await asyncio.to_thread(os.read, fd, 65536)).decode(errors="replace")
