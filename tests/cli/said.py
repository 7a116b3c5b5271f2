"""What a command says, in this process."""

from __future__ import annotations

from typing import Any

import msgspec
from typer.testing import CliRunner

from k2dist.cli.app import app


def said(*arguments: str) -> str:
    """What `k2dist ARGUMENTS` prints; its error if it has one."""
    result = CliRunner().invoke(app, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def said_as_json(*arguments: str) -> Any:
    return msgspec.json.decode(said(*arguments, "--json"))
