"""`k2dist inspect trace`: what happened to one request, as its coordinator and its lane remember it."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Annotated

import typer

from k2dist.cli.access import CaOption, CertOption, KeyFileOption, KeyOption, read_access
from k2dist.cli.chat import DEFAULT_ADDRESS
from k2dist.cli.shown import JsonOption, counted, print_json
from k2dist.observe import OutputTrace, Trace
from k2dist.service.client import Client


def trace(
    request: Annotated[str, typer.Argument(help="The request's id, as its answer gives it.")],
    address: Annotated[str, typer.Option(help="HOST:PORT of the coordinator.")] = DEFAULT_ADDRESS,
    as_json: JsonOption = False,
    ca: CaOption = None,
    cert: CertOption = None,
    key: KeyOption = None,
    api_key_file: KeyFileOption = None,
) -> None:
    """What happened to one request: while it runs, and for service.retain_s after its end. Where keys are
    asked for, the one that made it."""
    access = read_access(ca, cert, key, api_key_file)
    with Client(address, tls=access.tls, api_key=access.api_key) as client:
        found = client.trace(request)
    if as_json:
        print_json(found)
    else:
        typer.echo("\n".join(lines_of(found)))


def lines_of(trace: Trace) -> Iterator[str]:
    """Its way, a line for each thing that happened, with the seconds since its arrival."""
    arrived = datetime.fromtimestamp(trace.arrived_at, UTC)
    tenant = f", tenant {trace.tenant!r}" if trace.tenant else ""
    priority = f", priority {trace.priority}" if trace.priority else ""
    yield (
        f"{trace.request_id}: {counted(trace.num_prompt_tokens, 'prompt token')}, "
        f"{counted(len(trace.outputs), 'output')}{tenant}{priority}"
    )
    happened = [(0.0, f"arrived at {arrived:%Y-%m-%d %H:%M:%S}.{arrived.microsecond // 1000:03d} UTC")]
    if trace.sent_s is not None:
        happened.append((trace.sent_s, f"sent to lane {trace.lane}"))
    if trace.accepted_s is not None:
        happened.append((trace.accepted_s, f"accepted by lane {trace.lane}"))
    if trace.error:
        happened.append((trace.ended_s or 0.0, f"refused: {trace.error}"))
    for index, output in enumerate(trace.outputs):
        name = f"output {index}: " if len(trace.outputs) > 1 else ""
        happened += [(time_s, name + what) for time_s, what in _output(output, trace.accepted_s)]
    yield from (f"{time_s:10.3f} s  {what}" for time_s, what in sorted(happened, key=lambda one: one[0]))
    if trace.ended_s is None:
        yield "            it goes on"


def _output(output: OutputTrace, accepted_s: float | None) -> Iterator[tuple[float, str]]:
    course = output.course
    if course is not None and accepted_s is not None and (course.num_chunks or output.num_tokens):
        # By the lane's own clock, from its admission, which the coordinator heard of a moment later.
        found = f", {course.cached_tokens} prompt tokens found in the cache" if course.cached_tokens else ""
        yield accepted_s + course.queued_s, f"began to run{found}"
    if output.first_token_s is not None:
        chunks = "" if course is None else f", after {counted(course.num_chunks, 'chunk')} of the prompt"
        yield output.first_token_s, f"first token{chunks}"
    if output.last_token_s is not None and output.ended_s is None:
        yield output.last_token_s, f"newest token, {counted(output.num_tokens, 'token')} so far"
    if output.ended_s is not None:
        preempted = (
            f", preempted {counted(course.num_preemptions, 'time')}"
            if course is not None and course.num_preemptions
            else ""
        )
        error = f": {output.error}" if output.error else ""
        yield (
            output.ended_s,
            f"ended ({output.finish}) with {counted(output.num_tokens, 'token')}{preempted}{error}",
        )
