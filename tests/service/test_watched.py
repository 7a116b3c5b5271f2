"""Files that change under their reader."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from k2dist.errors import ConfigError
from k2dist.service.watched import Watched


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def read_number(path: Path) -> int:
    try:
        return int(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from error


def test_a_change_is_read_and_a_broken_one_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, clock = tmp_path / "n", Clock()
    path.write_text("1")
    watched = Watched((str(path),), lambda: read_number(path), clock=clock)
    assert watched.current() == 1
    path.write_text("22")
    assert watched.current() == 1  # not looked at more than once a second
    clock.now_s += 1.0
    assert watched.current() == 22
    for broken in ("x", None):
        caplog.clear()
        path.unlink() if broken is None else path.write_text(broken)
        for _ in range(3):
            clock.now_s += 1.0
            assert watched.current() == 22
        assert caplog.text.count("watched.not_reloaded") == 1
        assert str(path) in caplog.text
    path.write_text("3")
    clock.now_s += 1.0
    assert watched.current() == 3


def test_a_link_that_is_swapped_is_a_change(tmp_path: Path) -> None:
    """As Kubernetes updates a mounted secret."""
    clock = Clock()
    for name, text in (("a", "1"), ("b", "2")):
        (tmp_path / name).write_text(text)
    link = tmp_path / "data"
    link.symlink_to("a")
    watched = Watched((str(link),), lambda: read_number(link), clock=clock)
    (tmp_path / "new").symlink_to("b")
    os.replace(tmp_path / "new", link)
    clock.now_s += 1.0
    assert watched.current() == 2


def test_the_first_fault_is_the_callers(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="n: "):
        Watched(("n",), lambda: read_number(tmp_path / "n"))
