"""`k2dist doctor` and the look that `serve` takes, on this machine alone: nothing is started for either."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from k2dist.cli import app
from tests.e2e.command import write_config


@pytest.fixture(autouse=True)
def nothing_is_started(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    before = psutil.Process().children(recursive=True)
    yield
    assert set(psutil.Process().children(recursive=True)) <= set(before)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    """The exit code of `k2dist` with these arguments."""
    monkeypatch.setattr("sys.argv", ["k2dist", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        app.run()
    return int(ended.value.code or 0)


def test_this_machine_alone_is_looked_at_without_ray(
    tmp_path: Path,
    tiny_model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = write_config(tmp_path, "small")
    code = run(monkeypatch, "doctor", config, "--model", tiny_model_dir, "--quick")
    out, err = capsys.readouterr()
    assert code == 0, err
    assert "0 errors" in out
    assert "service.grpc=127.0.0.1:0 is free" in out


def test_serve_looks_first_and_starts_nothing_where_that_says_no(
    tmp_path: Path,
    tiny_model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = write_config(tmp_path, "two", parallel="{lanes: 2, tp: 1}", nodes="{num_nodes: 2}")
    assert run(monkeypatch, "serve", config, "--model", tiny_model_dir) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[-2].startswith("k2dist: error: ray: this machine alone, and nodes.num_nodes=2; start Ray")
    assert lines[-1].startswith("k2dist: error: `k2dist doctor` says more; --no-doctor starts nevertheless")
