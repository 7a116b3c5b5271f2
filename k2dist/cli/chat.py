"""`k2dist chat`: a conversation with a running cluster, over gRPC, in the terminal or in a pipe.

On a terminal Ctrl-C ends the current answer and Ctrl-D leaves. From a pipe each line is one message.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from typing import Annotated, Any

import msgspec
import typer

from k2dist.cli.access import CaOption, CertOption, KeyFileOption, KeyOption, read_access
from k2dist.config.cluster import ServiceConfig
from k2dist.demo import tools as demo
from k2dist.errors import K2Error, UsageError
from k2dist.messages import ChatMessage, ToolCall
from k2dist.service.answer_events import Delta
from k2dist.service.client import Client
from k2dist.service.client_request import PartialSampling
from k2dist.service.whole_answer import WholeAnswer

DEFAULT_ADDRESS = ServiceConfig().grpc
MAX_ROUNDS = 8  # of tool calls for one message

RunTool = Callable[[ToolCall], str]


def chat(
    address: Annotated[str, typer.Option(help="HOST:PORT of the coordinator.")] = DEFAULT_ADDRESS,
    system: Annotated[str | None, typer.Option(help="System message; default: the template's own.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy; default: the model's.")] = None,
    seed: Annotated[int | None, typer.Option(help="For answers that can be repeated.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Per answer; default: the rest of the context.")
    ] = None,
    tools: Annotated[Path | None, typer.Option(help="JSON list of tools; you type their results.")] = None,
    demo_tools: Annotated[bool, typer.Option(help="Offer the demo's tools, and run them.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per answer.")] = False,
    ca: CaOption = None,
    cert: CertOption = None,
    key: KeyOption = None,
    api_key_file: KeyFileOption = None,
) -> None:
    """Talk to a running cluster."""
    access = read_access(ca, cert, key, api_key_file)
    is_terminal = sys.stdin.isatty()
    declared, run_tool = _tools(tools, demo_tools=demo_tools, is_terminal=is_terminal)
    sampling = PartialSampling(temperature=temperature, seed=seed, max_tokens=max_tokens)
    with Client(address, tls=access.tls, api_key=access.api_key) as client:
        (model,) = client.models()
        if is_terminal:
            typer.echo(f"{model.name} at {address}. Ctrl-C ends an answer, Ctrl-D leaves.")
        conversation = Conversation(client, sampling, declared, run_tool, _say_nothing if as_json else _say)
        if system is not None:
            conversation.history.append(ChatMessage(role="system", content=system))
        while (line := _read_line("> ", is_terminal=is_terminal)) is not None:
            if line.strip():
                _take_turn(conversation, line, is_terminal=is_terminal, as_json=as_json)


class Conversation:
    """The history, and how it grows: a message, the calls it leads to, their results, the answer."""

    def __init__(
        self,
        client: Client,
        sampling: PartialSampling,
        tools: list[dict[str, Any]],
        run_tool: RunTool | None,
        say: Callable[[str], None],
    ) -> None:
        self.history: list[ChatMessage] = []
        self._client = client
        self._sampling = sampling
        self._tools = tools
        self._run_tool = run_tool
        self._say = say

    def ask(self, text: str) -> list[WholeAnswer]:
        """Answers to one message; all but the last call tools. An error leaves the history as it was."""
        before = len(self.history)
        answers: list[WholeAnswer] = []
        try:
            self.history.append(ChatMessage(role="user", content=text))
            while len(answers) < MAX_ROUNDS:
                answers.append(self._answer())
                self.history.append(answers[-1].message())
                if not self._run_calls(answers[-1].tool_calls):
                    break
        except BaseException:
            del self.history[before:]
            raise
        return answers

    def _run_calls(self, calls: list[ToolCall]) -> bool:
        """Show the calls, and add their results to the history; false if there are none."""
        for call in calls:
            self._say(f"[{call.name} {call.arguments}]")
            if self._run_tool is None:
                continue
            result = self._run_tool(call)
            self._say(f" -> {result}\n")
            self.history.append(
                ChatMessage(role="tool", name=call.name, tool_call_id=call.id, content=result)
            )
        return bool(calls) and self._run_tool is not None

    def _answer(self) -> WholeAnswer:
        answer = WholeAnswer()
        for event in self._client.chat(self.history, tools=self._tools, sampling=self._sampling):
            answer.add(event)
            if isinstance(event, Delta):
                self._say(event.text)
        return answer


def _take_turn(conversation: Conversation, line: str, *, is_terminal: bool, as_json: bool) -> None:
    """One message and its answers. On a terminal an error is shown and the conversation goes on."""
    try:
        answers = conversation.ask(line)
    except KeyboardInterrupt:
        if not is_terminal:
            raise
        typer.echo("\n(ended)")
        return
    except K2Error as error:
        if not is_terminal:
            raise
        typer.secho(f"\n{error}", err=True, fg="red")
        return
    if as_json:
        for answer in answers:
            typer.echo(_as_json(answer))
    else:
        typer.echo()


def _read_line(prompt: str, *, is_terminal: bool) -> str | None:
    """The next message; None at the end."""
    if not is_terminal:
        line = sys.stdin.readline()
        return line.rstrip("\n") if line else None
    while True:
        try:
            return input(prompt)
        except EOFError:
            typer.echo()
            return None
        except KeyboardInterrupt:
            typer.echo()  # nothing to end here; Ctrl-D leaves


def _say(text: str) -> None:
    """Print what an answer adds, as it comes."""
    sys.stdout.write(text)
    sys.stdout.flush()


def _say_nothing(text: str) -> None:
    del text  # answers are printed whole


def _as_json(answer: WholeAnswer) -> str:
    assert answer.accepted is not None
    assert answer.finished is not None
    shown = {
        "request_id": answer.accepted.request_id,
        "model": answer.accepted.model,
        "seed": answer.accepted.sampling.seed,
        "content": answer.text,
        "tool_calls": answer.tool_calls,
        "finish_reason": answer.finished.reason,
        "usage": answer.finished.usage,
    }
    return msgspec.json.encode(shown).decode()


# -- tools --------------------------------------------------------------------------------------------


def _tools(
    path: Path | None, *, demo_tools: bool, is_terminal: bool
) -> tuple[list[dict[str, Any]], RunTool | None]:
    """What to declare, and how to get a call's result: None if nobody can give one."""
    if demo_tools and path is not None:
        raise UsageError("--tools and --demo-tools: give one of the two")
    if demo_tools:
        return [dict(demo.declaration(name)) for name in _DEMO_TOOLS], run_demo_tool
    if path is None:
        return [], None
    try:
        declared = msgspec.json.decode(path.read_bytes(), type=list[dict[str, Any]])
    except (OSError, msgspec.DecodeError) as error:
        raise UsageError(f"--tools {path}: {error}; need a JSON list of tool objects") from error
    return declared, _ask_result if is_terminal else None


def _ask_result(call: ToolCall) -> str:
    return input(f"\nresult of {call.name}> ")


def run_demo_tool(call: ToolCall) -> str:
    """What the demo's tool answers; a made-up one, always the same for the same arguments."""
    run = _DEMO_TOOLS.get(call.name)
    if run is None:
        return f"error: there is no tool {call.name}"
    try:
        arguments = json.loads(call.arguments) if isinstance(call.arguments, str) else call.arguments
        return run(Random(json.dumps(arguments, sort_keys=True)), arguments)
    except (ValueError, TypeError, KeyError) as error:
        return f"error: {error!r}"  # the model sees what is wrong with its call, and may try again


def _weather(rng: Random, arguments: Mapping[str, Any]) -> str:
    return demo.weather_result(rng, arguments["city"], held_out=False)[0]


def _time(rng: Random, arguments: Mapping[str, Any]) -> str:
    return demo.time_result(rng, arguments["city"], held_out=False)[0]


def _add(rng: Random, arguments: Mapping[str, Any]) -> str:
    return demo.sum_result(rng, arguments["a"], arguments["b"])[0]


_DEMO_TOOLS: dict[str, Callable[[Random, Mapping[str, Any]], str]] = {
    "get_weather": _weather,
    "get_time": _time,
    "add": _add,
}
