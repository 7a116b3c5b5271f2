"""`k2dist doctor`: what is wrong with the machines, and what to do about it, before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from k2dist.cli.environment import ray_address
from k2dist.cli.shown import counted, print_json
from k2dist.config.load import load_cluster
from k2dist.demo import MODEL_DIR
from k2dist.doctor import Finding, Level, diagnose, errors_of, warnings_of

_STYLES = {Level.OK: "green", Level.WARNING: "yellow", Level.ERROR: "bold red"}
_NAMESPACE = "k2dist-doctor"  # in Ray, of the processes that look at its nodes


def doctor(
    config: Annotated[
        Path | None, typer.Argument(help="Cluster YAML; without one only what is wrong for any is found.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="Model directory; default: the config's, else the demo's.")
    ] = None,
    quick: Annotated[
        bool, typer.Option(help="Only what `serve` looks at: measure no disk, no link.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Facts and findings as one JSON object.")] = False,
) -> None:
    """Look at this machine, or, where RAY_ADDRESS is set, at every node of that Ray.

    Exit code 0 only if no finding is an error.
    """
    # With ray: not for `stop` and `chat`.
    from k2dist.cli.examine import gather_facts, needs_of_world
    from k2dist.cluster.start import joined_ray
    from k2dist.cluster.world import plan_world

    world = None
    if config is not None:
        cluster = load_cluster(config)
        chosen = model or (MODEL_DIR if cluster.model is None else Path(cluster.model))
        world = plan_world(cluster, chosen)
    address = ray_address()
    joining = nullcontext() if address is None else joined_ray(address, _NAMESPACE)
    with _looking(is_quiet=as_json), joining:
        facts = gather_facts(world, joins_ray=address is not None, is_quick=quick)
    needs = None if world is None else needs_of_world(world, joins_ray=address is not None)
    findings = diagnose(facts, needs)
    if as_json:
        print_json({"findings": findings, "facts": facts})
    else:
        _print(findings, Console())
    if errors_of(findings):
        raise typer.Exit(1)


@contextmanager
def _looking(*, is_quiet: bool) -> Iterator[None]:
    if is_quiet:
        yield
        return
    with Console(stderr=True).status("looking at machines, disks and links"):
        yield


def _print(findings: Sequence[Finding], console: Console) -> None:
    table = Table(box=box.SIMPLE, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        text = Text(finding.what)
        if finding.remedy:
            text.append(f"\n→ {finding.remedy}", style="bold")
        level = Text(finding.level, style=_STYLES[finding.level])
        table.add_row(level, finding.check, finding.node or "all", text)
    console.print(table)
    kinds = (errors_of(findings), "error"), (warnings_of(findings), "warning"), (findings, "finding")
    console.print(", ".join(counted(len(some), noun) for some, noun in kinds))
