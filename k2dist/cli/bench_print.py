"""What all benchmarks print with: one JSON object, or a table of figures."""

from __future__ import annotations

import msgspec
import typer
from rich import box
from rich.table import Table


def print_json(name: str, report: object) -> None:
    """`{"name": report}` on stdout, in one line."""
    typer.echo(msgspec.json.encode({name: report}).decode())


def figures(*titles: str, num_names: int = 1, is_narrow: bool = False) -> Table:
    """The first `num_names` columns to the left, figures to the right."""
    table = Table(box=box.SIMPLE, collapse_padding=is_narrow, pad_edge=not is_narrow)
    for index, title in enumerate(titles):
        table.add_column(title, justify="left" if index < num_names else "right", no_wrap=True)
    return table
