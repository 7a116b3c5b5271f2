"""`k2dist demo`: a real cluster on this machine, three conversations at once, and what ran where."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Annotated

import typer
from rich.console import Console

from k2dist.cli.access import read_access
from k2dist.cli.chat import Conversation, run_demo_tool
from k2dist.cli.demo_report import DemoReport, TalkReport, print_report, rank_reports
from k2dist.cli.demo_view import Chunk, Talk, watch_talks
from k2dist.cli.launch import launched
from k2dist.cli.prepare import check_here, prepare_world
from k2dist.cli.progress import start_progress
from k2dist.cli.shown import print_json
from k2dist.config.load import load_cluster
from k2dist.demo import LAPTOP_CONFIG, MODEL_DIR, tools
from k2dist.demo.corpus import TOOL_NAMES
from k2dist.errors import K2Error
from k2dist.service.client import Client
from k2dist.service.client_request import PartialSampling
from k2dist.service.tls import inner_tls

GREEDY = PartialSampling(temperature=0.0, max_tokens=160)
QUESTIONS = (
    Talk("who", "Who are you?"),
    Talk("capital", "What is the capital of Italy?"),
    Talk("weather", "What is the weather in Paris?", tool_names=("get_weather",)),
)


def demo(
    prompt: Annotated[str | None, typer.Option(help="Ask this instead of the three questions.")] = None,
    keep: Annotated[bool, typer.Option(help="Leave it serving; `k2dist stop` ends it.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what happened as one JSON object.")] = False,
    grpc: Annotated[str | None, typer.Option(help="HOST:PORT to listen on.")] = None,
    http: Annotated[str | None, typer.Option(help="HOST:PORT of the HTTP gateway.")] = None,
    config: Annotated[Path, typer.Option(help="Another cluster YAML.")] = LAPTOP_CONFIG,
    model: Annotated[Path, typer.Option(help="Another model directory.")] = MODEL_DIR,
) -> None:
    """Start a cluster on this machine, talk to its model, and show what ran where."""
    started_s = time.monotonic()
    world = prepare_world(load_cluster(config), model, grpc, http)
    check_here(world.config.service)
    talks = QUESTIONS if prompt is None else (Talk("prompt", prompt, TOOL_NAMES),)
    progress = start_progress(is_quiet=as_json)
    try:
        with launched(world, progress, is_detached=keep) as (cluster, status):
            ready_s = time.monotonic() - started_s
            tls = inner_tls(world.config.service.tls)
            with Client(status.address, tls=tls, api_key=read_access().api_key) as client:
                reports = converse(client, talks, is_quiet=as_json)
            report = DemoReport(
                cluster=world.config.name,
                address=status.address,
                http=status.http,
                ready_s=ready_s,
                total_s=time.monotonic() - started_s,
                talks=reports,
                ranks=rank_reports(world, status, cluster.rank_stats()),
                is_left_running=keep,
            )
            cluster.is_left_running = keep
            if as_json:
                print_json(report)
            else:
                print_report(report, _wide_console())
    except KeyboardInterrupt:
        typer.echo("ended.", err=True)
        raise typer.Exit(130) from None


def _wide_console() -> Console:
    """As wide as the tables where nobody's window says otherwise."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 110)


@dataclass(slots=True)
class _Clock:
    """When one conversation's tokens came, in seconds since it was asked."""

    started_s: float = field(default_factory=time.monotonic)
    first_s: float | None = None

    def note(self) -> None:
        if self.first_s is None:
            self.first_s = time.monotonic() - self.started_s


def converse(client: Client, talks: tuple[Talk, ...], *, is_quiet: bool) -> tuple[TalkReport, ...]:
    """Hold all conversations at once, shown as they go. Errors: the first that one of them met."""
    chunks: SimpleQueue[Chunk] = SimpleQueue()
    reports: dict[int, TalkReport] = {}
    failures: list[K2Error] = []

    def hold(index: int) -> None:
        try:
            reports[index] = _hold(client, talks[index], lambda text: chunks.put(Chunk(index, text)))
        except K2Error as error:
            failures.append(error)
        finally:
            chunks.put(Chunk(index, None))

    for index in range(len(talks)):
        # Daemons: a Ctrl-C does not wait for them; their streams end with the client.
        threading.Thread(target=hold, args=(index,), name=f"talk-{index}", daemon=True).start()
    watch_talks(talks, chunks, is_quiet=is_quiet, out=sys.stdout)
    if failures:
        raise failures[0]
    return tuple(reports[index] for index in range(len(talks)))


def _hold(client: Client, talk: Talk, say: Callable[[str], None]) -> TalkReport:
    clock = _Clock()

    def heard(text: str) -> None:
        clock.note()
        say(text)

    declared = [dict(tools.declaration(name)) for name in talk.tool_names]
    conversation = Conversation(client, GREEDY, declared, run_demo_tool, heard)
    answers = conversation.ask(talk.question)
    seconds = time.monotonic() - clock.started_s
    last = answers[-1]
    assert last.accepted is not None, "an answer that has ended was accepted"
    assert last.finished is not None, "ask returns when the last answer has ended"
    return TalkReport(
        name=talk.name,
        question=talk.question,
        answer=last.text,
        tool_calls=tuple(call for answer in answers for call in answer.tool_calls),
        finish_reason=last.finished.reason.value,
        lane=last.accepted.lane,
        num_prompt_tokens=last.accepted.prompt_tokens,
        num_tokens=sum(len(answer.token_ids) for answer in answers),
        first_token_s=clock.first_s or seconds,
        total_s=seconds,
    )
