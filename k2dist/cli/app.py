"""The commands, and what becomes of their errors."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib import import_module

import msgspec
import typer

from k2dist.errors import K2Error, UsageError

# Each has its own module. Only that of the command that was asked for is imported: with ray and grpc all of
# them take 0.9 s, and 60 MB.
_COMMANDS = ("demo", "serve", "chat", "generate", "stop", "plan", "doctor", "verify", "rehearse")
_GROUPS = ("inspect", "bench")


def run() -> None:
    """Run the command line. A K2Error becomes lines on stderr, or data on stdout with --json."""
    words = sys.argv[1:2]
    is_known = words and words[0] in (*_COMMANDS, *_GROUPS)
    try:
        commands(words if is_known else (*_COMMANDS, *_GROUPS))()
    except K2Error as error:
        sys.exit(_report(error, as_json="--json" in sys.argv[1:]))


def commands(names: Iterable[str]) -> typer.Typer:
    """The command line with these."""
    chosen = typer.Typer(
        help="Serve Kimi-K2 on a Ray cluster, or a small model of its kind on a laptop.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    chosen.callback()(lambda: None)  # a single command, too, is called by its name
    for name in names:
        found = getattr(import_module(f"k2dist.cli.{name}"), name)
        if name in _GROUPS:
            chosen.add_typer(found, name=name)
        else:
            chosen.command()(found)
    return chosen


def __getattr__(name: str) -> typer.Typer:
    """`app`: the command line with all of them."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return commands((*_COMMANDS, *_GROUPS))


def _report(error: K2Error, *, as_json: bool) -> int:
    """Say what went wrong; one line per fault. Returns the exit code."""
    exit_code = 2 if isinstance(error, UsageError) else 1
    if as_json:
        kind = type(error).__name__
        print(msgspec.json.encode({"error": {"kind": kind, "message": str(error)}}).decode(), flush=True)
    else:
        for line in str(error).splitlines():
            print(f"k2dist: error: {line}", file=sys.stderr, flush=True)
    return exit_code
