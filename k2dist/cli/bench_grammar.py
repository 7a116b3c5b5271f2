"""`k2dist bench grammar`: what masks cost beside a step, and compiling a grammar, as tables."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from k2dist.bench.grammar import (
    NUM_OUTPUTS,
    NUM_STEPS,
    NUM_THREADS,
    STEP_MS,
    GrammarCost,
    default_vocabulary,
    measure,
)
from k2dist.cli.bar import counting_bar
from k2dist.cli.shown import JsonOption, figures, print_report


def grammar(
    model: Annotated[
        Path | None, typer.Option(help="Model directory whose vocabulary to use; default: a random one.")
    ] = None,
    outputs: Annotated[int, typer.Option(help="That are constrained, in one step.")] = NUM_OUTPUTS,
    steps: Annotated[int, typer.Option(help="How many are timed.")] = NUM_STEPS,
    threads: Annotated[int, typer.Option(help="That make masks.")] = NUM_THREADS,
    as_json: JsonOption = False,
) -> None:
    """What grammar masks cost a rank's host at K2's vocabulary size, and compiling a grammar."""
    with counting_bar("steps", steps, is_quiet=as_json) as note:
        cost = measure(
            default_vocabulary(model),
            num_outputs=outputs,
            num_steps=steps,
            num_threads=threads,
            note=note,
        )
    print_report("grammar", cost, _print, as_json=as_json)


def _print(cost: GrammarCost, console: Console) -> None:
    table = figures("ms", "mean", "p99", "one CPU's mean", "p99")
    for name, spreads in (
        ("one mask", (cost.mask_ms, cost.mask_cpu_ms)),
        (f"a step of {cost.num_outputs} outputs", (cost.step_ms, cost.step_cpu_ms)),
    ):
        table.add_row(name, *(f"{value:.3f}" for spread in spreads for value in (spread.mean, spread.p99)))
    console.print(table)
    compiled = figures("constraint", "bytes", "compile ms")
    for one in cost.compiled:
        compiled.add_row(one.name, f"{one.num_bytes:,}", f"{one.compile_ms:.1f}")
    console.print(compiled)
    mean, p99 = (f"{100 * value / STEP_MS:.1f}%" for value in (cost.step_ms.mean, cost.step_ms.p99))
    console.print(
        f"Of a step of {STEP_MS:g} ms, behind whose forward pass they hide: mean {mean}, p99 {p99}.\n"
        f"{cost.num_steps} steps by {cost.num_threads} threads; vocabulary: {cost.vocabulary}, "
        f"{cost.vocab_size:,} tokens, read by the compiler in {cost.tokenizer_s:.1f} s, once in a process.",
        soft_wrap=True,
    )
