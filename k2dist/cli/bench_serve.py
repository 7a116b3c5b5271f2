"""`k2dist bench serve`: a load on a running server, and what its clients wait for, as a table."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from k2dist.cli.access import CaOption, CertOption, KeyFileOption, KeyOption, read_access
from k2dist.cli.bar import counting_bar
from k2dist.cli.environment import openai_api_key
from k2dist.cli.shown import JsonOption, figures, print_report
from k2dist.errors import UsageError

if TYPE_CHECKING:  # with grpc and aiohttp
    from k2dist.bench.percentiles import Percentiles
    from k2dist.bench.serve_report import ServeReport

INPUT_LEN, OUTPUT_LEN = 512, 128


def serve(
    url: Annotated[
        str, typer.Option(help="http://, https:// or grpc://HOST:PORT.")
    ] = "http://127.0.0.1:8000",
    requests: Annotated[int, typer.Option(help="In all.", min=1)] = 200,
    concurrency: Annotated[
        int | None,
        typer.Option(help="At most so many at a time. Default: 16, and no bound with --rate.", min=1),
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(help="Requests a second, at random times. Default: as answers come.", min=1e-6),
    ] = None,
    dataset: Annotated[
        Path | None,
        typer.Option(help='JSONL: {"messages": [...]} with any fields of a chat, or {"prompt": "..."}.'),
    ] = None,
    input_len: Annotated[
        int | None, typer.Option(help=f"Tokens of each made-up prompt. Default: {INPUT_LEN}.", min=1)
    ] = None,
    output_len: Annotated[
        int | None,
        typer.Option(
            help=f"Tokens of each answer: exactly ({OUTPUT_LEN}), or with --dataset at most.", min=1
        ),
    ] = None,
    model: Annotated[str, typer.Option(help="Default: the first that the server lists.")] = "",
    timeout: Annotated[float, typer.Option(help="Seconds that one answer may take.")] = 600.0,
    seed: Annotated[int, typer.Option(help="Of prompts and times.")] = 0,
    as_json: JsonOption = False,
    ca: CaOption = None,
    cert: CertOption = None,
    key: KeyOption = None,
    api_key_file: KeyFileOption = None,
) -> None:
    """First token, next token, whole answer and throughput of a server, as its clients see them."""
    # With grpc and aiohttp: not for others.
    from k2dist.bench.serve import Load, measure
    from k2dist.bench.serve_asks import made_up, of_file
    from k2dist.bench.serve_targets import make_target

    if dataset is not None and input_len is not None:
        raise UsageError("--input-len: the prompts are --dataset's; leave one of the two out")
    if dataset is None:
        asks = made_up(input_len or INPUT_LEN, output_len or OUTPUT_LEN, seed)
    else:
        asks = of_file(dataset, output_len, seed)
    access = read_access(ca, cert, key, api_key_file)
    api_key = access.api_key or openai_api_key() or ""
    target = make_target(url, model=model, timeout_s=timeout, tls=access.tls, api_key=api_key)
    load = Load(num_requests=requests, concurrency=concurrency, rate_per_s=rate, seed=seed)
    with counting_bar("answers", requests, is_quiet=as_json) as note:
        report = asyncio.run(measure(target, asks, load, note))
    print_report("serve", report, _print, as_json=as_json)
    if report.num_failed:
        raise typer.Exit(1)


def _print(report: ServeReport, console: Console) -> None:
    table = figures("ms", "mean", "p50", "p90", "p95", "p99", "max", "count", is_narrow=True)
    for title, spread in (
        ("first token", report.first_ms),
        ("next event", report.event_ms),
        ("each later token", report.token_ms),
        ("whole answer", report.whole_ms),
    ):
        table.add_row(title, *_cells(spread))
    console.print(table)
    console.print(
        f"{report.url}: {report.num_requests} requests in {report.seconds:.1f} s, "
        f"{report.num_failed} failed\n"
        f"{report.requests_per_s:.2f} requests/s; tokens/s: {report.completion_tokens_per_s:,.1f} generated, "
        f"{report.prompt_tokens_per_s:,.1f} of prompts; {report.tokens_per_event:.2f} tokens an event",
        soft_wrap=True,
    )
    for message, times in report.errors.items():
        console.print(f"failed {times} times: {message}", soft_wrap=True, style="red")


def _cells(spread: Percentiles) -> tuple[str, ...]:
    values = (spread.mean, spread.p50, spread.p90, spread.p95, spread.p99, spread.max)
    return (*(f"{value:,.1f}" for value in values), str(spread.count))
