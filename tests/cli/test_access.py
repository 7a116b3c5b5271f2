"""How a command shows who it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from k2dist.cli.access import read_access
from k2dist.errors import UsageError


def test_a_key_comes_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "key"
    path.write_text("k2_a_b\n")
    assert read_access().api_key == ""
    assert read_access(key_file=path).api_key == "k2_a_b"
    monkeypatch.setenv("K2DIST_API_KEY", "k2_c_d")
    assert read_access().api_key == "k2_c_d"
    assert read_access(key_file=path).api_key == "k2_a_b"  # what is said wins


@pytest.mark.parametrize("text", ["two words", "two\nlines", "ümlaut", "\x00"])
def test_what_cannot_be_sent_is_refused_without_being_shown(tmp_path: Path, text: str) -> None:
    path = tmp_path / "key"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"--api-key-file .*key: not an API key") as caught:
        read_access(key_file=path)
    assert text not in str(caught.value)


def test_options_go_together(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="say with --ca"):
        read_access(cert=Path("c"), key=Path("k"))
    with pytest.raises(UsageError, match="cannot be read"):
        read_access(key_file=tmp_path / "nothing")
    tls = read_access("ca.pem", Path("c"), Path("k")).tls
    assert tls is not None
    assert (tls.ca, tls.cert, tls.key) == ("ca.pem", "c", "k")
