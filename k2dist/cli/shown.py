"""What commands print what they found with: one JSON object, or a table of figures and lines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, TypeVar

import msgspec
import typer
from rich import box
from rich.console import Console
from rich.table import Table

Report = TypeVar("Report")
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def print_json(value: object) -> None:
    """On stdout, in one line."""
    typer.echo(msgspec.json.encode(value).decode())


def print_report(
    name: str, report: Report, print_text: Callable[[Report, Console], None], *, as_json: bool
) -> None:
    """A benchmark's: `{"name": report}`, or for people."""
    if as_json:
        print_json({name: report})
    else:
        print_text(report, Console())


def figures(*titles: str, num_names: int = 1, is_narrow: bool = False) -> Table:
    """The first `num_names` columns to the left, figures to the right."""
    table = Table(box=box.SIMPLE, collapse_padding=is_narrow, pad_edge=not is_narrow)
    for index, title in enumerate(titles):
        table.add_column(title, justify="left" if index < num_names else "right", no_wrap=True)
    return table


def counted(number: int, noun: str) -> str:
    """1 error, or 2,000 errors."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
