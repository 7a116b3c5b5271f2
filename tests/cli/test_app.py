"""The command line imports what its command needs, and no more."""

from __future__ import annotations

import subprocess
import sys

import pytest
import typer

from k2dist.cli import app

ASKED = """
import sys
sys.argv = ["k2dist", {command!r}, "--help"]
from k2dist.cli.app import run
try:
    run()
except SystemExit:
    pass
found = [name for name in ("torch", "ray", "grpc", "numpy") if name in sys.modules]
print("imported", *found, file=sys.stderr)
"""


@pytest.mark.parametrize("command", ["generate", "verify"])
def test_a_command_imports_no_other(command: str) -> None:
    """Ray, gRPC and torch take two seconds of a command's first five."""
    done = subprocess.run(
        [sys.executable, "-c", ASKED.format(command=command)], check=True, capture_output=True, text=True
    )
    assert command in done.stdout
    assert done.stderr.split() == ["imported"]


def test_all_commands_are_there() -> None:
    commands = typer.main.get_command(app.app).commands  # type: ignore[attr-defined]
    assert {"demo", "generate", "bench", "inspect"} <= commands.keys()
    assert {"shards", "trace"} == commands["inspect"].commands.keys()


def test_a_single_command_is_called_by_its_name() -> None:
    assert list(typer.main.get_command(app.commands(["plan"])).commands) == ["plan"]  # type: ignore[attr-defined]
