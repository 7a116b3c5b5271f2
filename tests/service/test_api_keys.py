"""Keys: what is stored of them, who is found by them, what a key may do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from k2dist.errors import ConfigError
from k2dist.service.api_keys import KeyEntry, KeyTable, new_key, read_keys
from k2dist.service.auth import ANYBODY, Caller, Gate
from k2dist.service.client_request import ClientRequest
from k2dist.service.error_codes import ForbiddenError, RateLimitError, UnauthenticatedError
from k2dist.service.new_key import add_key
from k2dist.service.owned_ids import inner_id, outer_id


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def test_a_key_is_found_by_all_of_itself_and_stored_as_a_hash(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    keys = [add_key(path, tenant="a"), add_key(path, tenant="b", role="operator", max_priority=5)]
    text = path.read_text()
    table = read_keys(str(path))
    for key, tenant in zip(keys, "ab", strict=True):
        assert key not in text
        assert key.split("_", 2)[2] not in text
        found = table.find(key)
        assert found is not None
        assert found.tenant == tenant
        for wrong in (
            key[:-1],
            key + "x",
            key[:-1] + ("A" if key[-1] != "A" else "B"),
            key.upper(),
            f" {key}",
        ):
            assert table.find(wrong) is None
    swapped = keys[0][: keys[0].rindex("_")] + keys[1][keys[1].rindex("_") :]
    assert table.find(swapped) is None
    assert table.find("") is None
    assert path.stat().st_mode & 0o077 == 0


def test_each_key_has_256_bits_and_none_comes_twice() -> None:
    keys = {new_key()[0] for _ in range(100)}
    assert len(keys) == 100
    assert all(len(key.split("_", 2)[2]) == 43 for key in keys)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("a: b", "expected `array`"),
        ("- {id: a}", "sha256"),
        ("- {id: a, sha256: '12', tenant: t}", "sha256"),
        (f"- {{id: a, sha256: {'a' * 64}, tenant: ''}}", "tenant"),
        (f"- {{id: a, sha256: {'a' * 64}, tenant: t, role: king}}", "role"),
        (f"- {{id: a, sha256: {'a' * 64}, tenant: t, colour: red}}", "colour"),
        (f"- {{id: a, sha256: {'a' * 64}, tenant: t, requests_per_minute: 0}}", "requests_per_minute"),
        (f"- {{id: a, sha256: {'a' * 64}, tenant: t}}\n- {{id: a, sha256: {'b' * 64}, tenant: t}}", "id a"),
        ("- [", "not YAML"),
    ],
)
def test_a_wrong_file_is_refused_by_its_name(tmp_path: Path, text: str, fault: str) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"keys\.yaml") as caught:
        read_keys(str(path))
    assert fault.lower() in str(caught.value).lower()


def test_who_is_nobody_gets_in_nowhere(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    key = add_key(path, tenant="a")
    gate = Gate(str(path))
    assert gate.identify(bearer(key)).tenant == "a"
    assert gate.identify({"authorization": f"bearer {key}"}).tenant == "a"
    assert gate.identify({"x-api-key": key}).tenant == "a"
    for headers in (
        {},
        {"authorization": key},
        bearer(key[:-1]),
        {"x-api-key": ""},
        {"authorization": "Basic x"},
    ):
        with pytest.raises(UnauthenticatedError):
            gate.identify(headers)
    assert Gate(None).identify({}) == ANYBODY


def test_each_role_has_its_methods(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    roles = ("client", "monitor", "operator")
    keys = {role: add_key(path, tenant="a", role=role) for role in roles}
    gate = Gate(str(path), inner_key="inner")
    may = {
        "/k2dist.v1.Inference/Generate": {"client", "operator"},
        "/k2dist.v1.Inference/SomethingNew": {"client", "operator"},
        "/k2dist.v1.Inference/ListModels": set(roles),
        "/k2dist.v1.Control/GetTopology": set(roles),
        "/k2dist.v1.Control/WatchCluster": set(roles),
        "/k2dist.v1.Control/Drain": {"operator"},
        "/k2dist.v1.Control/SomethingNew": {"operator"},
        "/another.Service/Method": {"operator"},
    }
    for method, allowed in may.items():
        with pytest.raises(UnauthenticatedError):
            gate.check_method(method, {})
        for role, key in keys.items():
            if role in allowed:
                gate.check_method(method, bearer(key))
            else:
                with pytest.raises(ForbiddenError, match=f"this key is for {role}s"):
                    gate.check_method(method, bearer(key))
    gate.check_method("/grpc.health.v1.Health/Check", {})
    gate.check_method("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", {})
    gate.check_method("/k2dist.v1.Control/GetTopology", bearer("inner"))
    with pytest.raises(ForbiddenError):
        gate.check_method("/k2dist.v1.Inference/Generate", bearer("inner"))


def test_the_tenant_is_the_keys_and_the_priority_is_bounded() -> None:
    caller = Caller(key_id="k", tenant="a", role="client", max_priority=1)
    assert caller.own(ClientRequest(prompt="x")).tenant == "a"
    assert caller.own(ClientRequest(prompt="x", tenant="a", priority=1)).tenant == "a"
    with pytest.raises(ForbiddenError, match="this key is of 'a'"):
        caller.own(ClientRequest(prompt="x", tenant="b"))
    with pytest.raises(ForbiddenError, match="priority 2"):
        caller.own(ClientRequest(prompt="x", priority=2))
    assert ANYBODY.own(ClientRequest(prompt="x", tenant="b", priority=9)).tenant == "b"


def test_ids_of_two_keys_never_meet() -> None:
    names = {inner_id(key_id, name) for key_id in ("k1", "k2", "") for name in ("r", "k1/r", "k1")}
    assert len(names) == 9
    assert {outer_id(name) for name in names} == {"r", "k1/r", "k1"}


def test_keys_and_limits_change_without_a_restart(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, clock = tmp_path / "keys.yaml", Clock()
    key = add_key(path, tenant="a", requests_per_minute=1)
    gate = Gate(str(path), clock=clock)
    caller = gate.identify(bearer(key))
    gate.admit(caller)
    with pytest.raises(RateLimitError) as caught:
        gate.admit(caller)
    assert caught.value.retry_after_s == pytest.approx(60.0)
    text = path.read_text()
    path.write_text(text.replace("requests_per_minute: 1", "requests_per_minute: 2"))
    clock.now_s += 1.0
    gate.admit(caller)  # the second of two
    path.write_text("- half of an ent")
    clock.now_s += 1.0
    assert gate.identify(bearer(key)) == caller  # the old ones stay in force
    assert "watched.not_reloaded" in caplog.text
    assert str(path) in caplog.text
    later = add_key(tmp_path / "others.yaml", tenant="b")
    path.write_text((tmp_path / "others.yaml").read_text())
    clock.now_s += 1.0
    assert gate.identify(bearer(later)).tenant == "b"
    with pytest.raises(UnauthenticatedError):
        gate.identify(bearer(key))
    assert key not in caplog.text
    assert later not in caplog.text


def test_keys_of_one_tenant_have_limits_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    keys = [add_key(path, tenant="a", requests_per_minute=1) for _ in range(2)]
    gate = Gate(str(path), clock=Clock())
    for key in keys:
        gate.admit(gate.identify(bearer(key)))
        with pytest.raises(RateLimitError):
            gate.admit(gate.identify(bearer(key)))


def test_the_tool_adds_to_the_file_and_prints_the_key_once(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    first = add_key(path, tenant="a")
    command = [
        sys.executable,
        "-m",
        "k2dist.service.new_key",
        str(path),
        "--tenant",
        "b",
        "--role",
        "operator",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=dict(os.environ))
    table = read_keys(str(path))
    found = table.find(done.stdout.strip())
    assert found is not None
    assert (found.tenant, found.role) == ("b", "operator")
    assert table.find(first) is not None
    path.write_text("- broken")
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))
    assert done.returncode == 1
    assert "keys.yaml" in done.stderr
    assert path.read_text() == "- broken"


def test_an_unknown_id_is_compared_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether there is such an id is not told by the time it takes."""
    compared: list[tuple[str, str]] = []

    def compare(a: str, b: str) -> bool:
        compared.append((a, b))
        return a == b

    monkeypatch.setattr("k2dist.service.api_keys.hmac.compare_digest", compare)
    key, digest = new_key("a")
    table = KeyTable([KeyEntry(id="a", sha256=digest, tenant="t")])
    assert table.find(key) is not None
    assert table.find(new_key("b")[0]) is None
    assert table.find("no key at all") is None
    assert len(compared) == 3
