"""`k2dist serve` takes its config in one place, either of two."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from k2dist.cli.app import app
from k2dist.errors import ConfigError, UsageError


@pytest.mark.parametrize("arguments", [["nosuch.yaml"], ["--config", "nosuch.yaml"]])
def test_the_config_is_an_argument_or_an_option(arguments: list[str]) -> None:
    result = CliRunner().invoke(app, ["serve", *arguments])
    assert isinstance(result.exception, ConfigError)
    assert "nosuch.yaml: cannot be read" in str(result.exception)


@pytest.mark.parametrize("arguments", [[], ["a.yaml", "--config", "b.yaml"]])
def test_no_config_and_two_are_refused(arguments: list[str]) -> None:
    result = CliRunner().invoke(app, ["serve", *arguments])
    assert isinstance(result.exception, UsageError)
    assert "give one cluster YAML" in str(result.exception)


def test_help_speaks_of_both_once() -> None:
    help_text = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "200"}).output
    assert help_text.count("--config") == 1
    assert "cluster_configs" in help_text
