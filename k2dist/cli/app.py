"""The commands, and what becomes of their errors."""

from __future__ import annotations

import sys

import msgspec
import typer

from k2dist.cli.bench import bench
from k2dist.cli.chat import chat
from k2dist.cli.demo import demo
from k2dist.cli.doctor import doctor
from k2dist.cli.generate import generate
from k2dist.cli.inspect import inspect
from k2dist.cli.plan import plan
from k2dist.cli.rehearse import rehearse
from k2dist.cli.serve import serve
from k2dist.cli.stop import stop
from k2dist.cli.trace import trace
from k2dist.cli.verify import verify
from k2dist.errors import K2Error, UsageError

app = typer.Typer(
    help="Serve Kimi-K2 on a Ray cluster, or a small model of its kind on a laptop.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(demo)
app.command()(serve)
app.command()(chat)
app.command()(generate)
app.command()(stop)
app.command()(plan)
app.command()(doctor)
app.command()(verify)
app.command()(rehearse)
inspect.command()(trace)
app.add_typer(inspect, name="inspect")
app.add_typer(bench, name="bench")


def run() -> None:
    """Run the command line. A K2Error becomes lines on stderr, or data on stdout with --json."""
    try:
        app()
    except K2Error as error:
        sys.exit(_report(error, as_json="--json" in sys.argv[1:]))


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
