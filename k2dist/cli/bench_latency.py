"""`k2dist bench latency`: a cluster idle, its first and next tokens, and calls while it steps, as a table."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from k2dist.cli.bench_bar import bench_bar
from k2dist.cli.bench_print import figures, print_json
from k2dist.cli.environment import ray_address
from k2dist.demo import LAPTOP_CONFIG
from k2dist.errors import UsageError

if TYPE_CHECKING:  # with ray and grpc
    from k2dist.bench.latency import Latency


def latency(
    config: Annotated[
        Path, typer.Argument(help="Cluster YAML; default: the laptop's, as in cluster_configs/.")
    ] = LAPTOP_CONFIG,
    model: Annotated[
        Path | None, typer.Option(help="Model directory; default: the config's, else the demo's.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Of each wait.")] = 50,
    window: Annotated[float, typer.Option(help="Seconds of each window of CPU time or of steps.")] = 5.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """What a cluster on this machine costs while idle, and how soon it answers, idle and busy."""
    # With ray and grpc: not for others.
    from k2dist.bench.latency import measure, num_notes
    from k2dist.cli.prepare import prepare_world
    from k2dist.config.load import load_cluster

    if ray_address() is not None:
        raise UsageError("RAY_ADDRESS is set, and this measures a Ray of its own; unset it")
    world = prepare_world(load_cluster(config), model, "127.0.0.1:0", is_here=True)
    with bench_bar("measurements", is_quiet=as_json) as show:
        done = count(1)
        found = measure(
            world, num_samples=samples, window_s=window, note=lambda: show(next(done), num_notes(samples))
        )
    if as_json:
        print_json("latency", found)
    else:
        _print(found, Console())


def _print(found: Latency, console: Console) -> None:
    idle, calls = found.idle, found.calls
    table = figures("ms", "p50", "p95", "worst", "count")
    for title, waits in (
        ("first token, after idle", found.first_token.after_idle),
        ("first token, beside a decode", found.first_token.beside_a_decode),
        ("next token, alone", found.next_token.alone),
        (f"next token, beside prompts of {found.next_token.prompt_len}", found.next_token.beside_prompts),
        ("admit, while all lanes step", calls.admit),
        ("cancel, while all lanes step", calls.cancel),
    ):
        times_ms = (waits.p50_ms, waits.p95_ms, waits.max_ms)
        table.add_row(title, *(f"{time_ms:.1f}" for time_ms in times_ms), str(waits.count))
    console.print(table)
    console.print(
        f"idle: {idle.cluster_percent:.1f}% of a core; {idle.num_actors} Ray actors that do nothing: "
        f"{idle.actors_percent:.1f}%; {idle.more_percent:+.1f} points (medians of {idle.num_windows} windows "
        f"of {idle.window_s:g} s)\n"
        f"a step: {calls.step_ms:.1f} ms; with {calls.calls_per_s:g} calls of each kind a second "
        f"{calls.step_ms_with_calls:.1f} ms ({100 * (calls.cost_ratio - 1):+.1f}%)",
        soft_wrap=True,
    )
