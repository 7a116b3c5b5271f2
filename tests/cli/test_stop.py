"""`k2dist stop --drain`: through the coordinator's gRPC, as a client."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from k2dist._proto.v1 import control_pb2
from k2dist.cli.app import app
from k2dist.cluster.record import ClusterRecord, write_record
from k2dist.errors import UsageError
from k2dist.service import client as client_module

RECORD = ClusterRecord(
    name="here", ray_address="127.0.0.1:1", grpc="127.0.0.1:50999", http="", host=None, driver=None
)


class DrainingClient:
    """In the place of `Client`; `asked` says how it was made and what for."""

    asked: list[tuple[str, str, float | None]]
    answer: control_pb2.DrainResponse

    def __init__(self, address: str, *, tls: object, api_key: str) -> None:
        self._who = (address, api_key)

    def __enter__(self) -> DrainingClient:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def drain(self, timeout_s: float | None) -> control_pb2.DrainResponse:
        self.asked.append((*self._who, timeout_s))
        return self.answer


@pytest.fixture
def draining(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[DrainingClient]:
    DrainingClient.asked = []
    DrainingClient.answer = control_pb2.DrainResponse(is_drained=True)
    monkeypatch.setattr(client_module, "Client", DrainingClient)
    monkeypatch.setattr("k2dist.cli.stop.records_dir", lambda: tmp_path)
    write_record(tmp_path, RECORD)
    return DrainingClient


def test_draining_asks_the_coordinator_that_is_noted(draining: type[DrainingClient], tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("k2_a_b\n")
    result = CliRunner().invoke(app, ["stop", "--drain", "--api-key-file", str(key)])
    assert result.exit_code == 0, result.output
    assert "takes no new requests, and it is empty" in result.output
    result = CliRunner().invoke(app, ["stop", "--drain", "--address", "far:1", "--timeout", "9"])
    assert result.exit_code == 0, result.output
    assert draining.asked == [("127.0.0.1:50999", "k2_a_b", None), ("far:1", "", 9.0)]


def test_what_goes_on_after_the_timeout_is_said(draining: type[DrainingClient]) -> None:
    draining.answer = control_pb2.DrainResponse(is_drained=False, live_outputs=3)
    result = CliRunner().invoke(app, ["stop", "--drain", "--name", "here", "--json"])
    assert result.exit_code == 1
    assert json.loads(result.output) == {"drained": False, "live_outputs": 3}


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["stop", "--timeout", "3"], "--timeout and --address: they are for --drain"),
        (["stop", "--drain", "--name", "elsewhere"], "'elsewhere' is noted"),
    ],
)
@pytest.mark.usefixtures("draining")
def test_what_does_not_fit_together_is_refused(arguments: list[str], match: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, UsageError)
    assert match in str(result.exception)
