"""`k2dist bench random-model`: the model that the README's CPU figures are of."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def random_model(
    directory: Annotated[Path, typer.Argument(help="Where to write it; made if it is not there.")],
) -> None:
    """Write a K2-shaped model of 1.3 billion random weights (1.4 GB), for `k2dist bench offline`."""
    from k2dist.bench.random_model import write_random_model  # with torch: not for others

    write_random_model(directory)
    typer.echo(f"{directory}: measure it with `k2dist bench offline {directory}`")
