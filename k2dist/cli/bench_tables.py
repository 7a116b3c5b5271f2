"""What `k2dist bench` found, as tables for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from k2dist.bench.grammar import STEP_MS, GrammarCost
from k2dist.bench.scheduler import SchedulerCost

if TYPE_CHECKING:  # with ray and grpc
    from k2dist.bench.latency import Latency
    from k2dist.bench.waits import Waits


def print_scheduler(costs: Sequence[SchedulerCost], console: Console) -> None:
    table = _table("decoding", "waiting", "plan ms", "commit ms", "step ms", "best", "worst", "us/row")
    for cost in costs:
        medians = (cost.plan_ms, cost.commit_ms, cost.step_ms)
        table.add_row(
            f"{cost.num_decoding:,}",
            f"{cost.num_waiting:,}",
            *(f"{time_ms:.3f}" for time_ms in medians),
            f"{cost.step_ms_min:.2f}",
            f"{cost.step_ms_max:.2f}",
            f"{cost.row_us:.2f}",
        )
    console.print(table)
    console.print("Medians of wall time; a step is plan and commit; best and worst step.")


def print_grammar(cost: GrammarCost, console: Console) -> None:
    table = _table("ms", "mean", "p99", "one CPU's mean", "p99", first_left=True)
    for name, spreads in (
        ("one mask", (cost.mask_ms, cost.mask_cpu_ms)),
        (f"a step of {cost.num_outputs} outputs", (cost.step_ms, cost.step_cpu_ms)),
    ):
        table.add_row(name, *(f"{value:.3f}" for spread in spreads for value in (spread.mean, spread.p99)))
    console.print(table)
    compiled = _table("constraint", "bytes", "compile ms", first_left=True)
    for one in cost.compiled:
        compiled.add_row(one.name, f"{one.num_bytes:,}", f"{one.compile_ms:.1f}")
    console.print(compiled)
    shares = (f"{100 * value / STEP_MS:.1f}%" for value in (cost.step_ms.mean, cost.step_ms.p99))
    console.print(f"Of a step of {STEP_MS:g} ms, behind whose forward pass they hide: {', '.join(shares)}.")
    console.print(
        f"{cost.num_steps} steps by {cost.num_threads} threads; vocabulary: {cost.vocabulary}, "
        f"{cost.vocab_size:,} tokens, read by the compiler in {cost.tokenizer_s:.1f} s, once in a process."
    )


def print_latency(found: Latency, console: Console) -> None:
    idle, calls = found.idle, found.calls
    table = _table("ms", "p50", "p95", "worst", "count", first_left=True)
    for title, waits in (
        ("first token, after idle", found.first_token.after_idle),
        ("first token, beside a decode", found.first_token.beside_a_decode),
        ("next token, alone", found.next_token.alone),
        (f"next token, beside prompts of {found.next_token.prompt_len}", found.next_token.beside_prompts),
        ("admit, while all lanes step", calls.admit),
        ("cancel, while all lanes step", calls.cancel),
    ):
        table.add_row(title, *_cells(waits))
    console.print(table)
    console.print(
        f"Idle: {idle.cluster_percent:.1f}% of a core; {idle.num_actors} Ray actors that do nothing: "
        f"{idle.actors_percent:.1f}%; {idle.more_percent:+.1f} points (medians of {idle.num_windows} windows "
        f"of {idle.window_s:g} s)."
    )
    console.print(
        f"A step: {calls.step_ms:.1f} ms; with {calls.calls_per_s:g} calls of each kind a second "
        f"{calls.step_ms_with_calls:.1f} ms ({100 * (calls.cost_ratio - 1):+.1f}%)."
    )


def _cells(waits: Waits) -> tuple[str, ...]:
    return f"{waits.p50_ms:.1f}", f"{waits.p95_ms:.1f}", f"{waits.max_ms:.1f}", str(waits.count)


def _table(*titles: str, first_left: bool = False) -> Table:
    table = Table(box=box.SIMPLE)
    for index, title in enumerate(titles):
        table.add_column(title, justify="left" if first_left and index == 0 else "right", no_wrap=True)
    return table
