"""`k2dist bench latency`: a cluster idle, its first and next tokens, and calls while it steps, as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from k2dist.cli.bar import counting_bar
from k2dist.cli.here import ConfigArgument, ModelOption, refuse_joined_ray, world_here
from k2dist.cli.shown import JsonOption, figures, print_report
from k2dist.demo import LAPTOP_CONFIG

if TYPE_CHECKING:  # with ray and grpc
    from k2dist.bench.latency import Latency


def latency(
    config: ConfigArgument = LAPTOP_CONFIG,
    model: ModelOption = None,
    samples: Annotated[int, typer.Option(help="Of each wait.", min=1)] = 50,
    window: Annotated[
        float, typer.Option(help="Seconds of each window of CPU time or of steps.", min=0.1)
    ] = 5.0,
    as_json: JsonOption = False,
) -> None:
    """What a cluster on this machine costs while idle, and how soon it answers, idle and busy."""
    from k2dist.bench.latency import measure, num_notes  # with ray and grpc: not for others

    refuse_joined_ray()
    world = world_here(config, model)
    with counting_bar("measurements", num_notes(samples), is_quiet=as_json) as note:
        found = measure(world, num_samples=samples, window_s=window, note=note)
    print_report("latency", found, _print, as_json=as_json)


def _print(found: Latency, console: Console) -> None:
    idle, calls = found.idle, found.calls
    table = figures("ms", "p50", "p95", "worst", "count")
    for title, waits in (
        ("first token, after idle", found.first_token.after_idle_ms),
        ("first token, beside a decode", found.first_token.beside_a_decode_ms),
        ("next token, alone", found.next_token.alone_ms),
        (f"next token, beside prompts of {found.next_token.prompt_len}", found.next_token.beside_prompts_ms),
        ("admit, while all lanes step", calls.admit_ms),
        ("cancel, while all lanes step", calls.cancel_ms),
    ):
        times_ms = (waits.p50, waits.p95, waits.max)
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
