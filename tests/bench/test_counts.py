"""Counts that make no sense are refused by their option, before anything is measured."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from k2dist.cli.app import app


@pytest.mark.parametrize(
    "command",
    [
        *("bits --turns -1", "bits --prompt-rows 0", "bits --batch 4 --batch 0"),
        *("offline --prompt-len 0", "offline --decode-tokens 0", "offline --batch 1 --batch 0"),
        *("gateway --streams 0", "gateway --cores 0", "gateway --seconds 0", "gateway --pace 0"),
        *("scheduler --decoding 0", "scheduler --waiting -1", "scheduler --steps 0"),
        *("serve --requests 0", "serve --concurrency 0", "serve --rate 0", "serve --output-len 0"),
        *("latency --samples 0", "latency --window 0", "load --rounds 0"),
    ],
)
def test_a_count_out_of_range_is_refused_by_its_option(command: str) -> None:
    *_, option, _ = command.split()
    result = CliRunner().invoke(app, ["bench", *command.split()], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert f"Invalid value for '{option}'" in result.output
