"""What `nvidia-smi` prints, as it was or could be; and what is said where it is absent, fails or hangs."""

from __future__ import annotations

import subprocess

import pytest

from k2dist.probe import gpus
from k2dist.probe.gpus import find_gpus, read_gpus

# The form of `--format=csv,noheader,nounits`, with the memory that an H200's driver reports.
TWO = """\
0, NVIDIA H200, 550.127.05, 9.0, 143771, 143158, Disabled, 0
1, NVIDIA H200, 550.127.05, 9.0, 143771, 12, Enabled, 2
"""
CONSUMER = "0, NVIDIA GeForce RTX 4090, 565.57.01, 8.9, 24564, 24079, [N/A], [N/A]\n"


def test_each_line_is_a_gpu() -> None:
    first, second = read_gpus(TWO)
    assert (first.index, first.name, first.driver, first.capability) == (
        0,
        "NVIDIA H200",
        "550.127.05",
        "9.0",
    )
    assert (first.memory_bytes, first.free_bytes) == (143771 * 2**20, 143158 * 2**20)
    assert (first.is_split, first.num_ecc_errors) == (False, 0)
    assert (second.index, second.is_split, second.num_ecc_errors) == (1, True, 2)


def test_what_a_gpu_does_not_have_is_unknown() -> None:
    (only,) = read_gpus(CONSUMER)
    assert (only.is_split, only.num_ecc_errors) == (False, None)


def answering(stdout: str, returncode: int) -> object:
    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert command[0] == "nvidia-smi"
        return subprocess.CompletedProcess(command, returncode, stdout, "")

    return run


def test_a_driver_that_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus.subprocess, "run", answering(TWO, 0))
    found, reason = find_gpus()
    assert (len(found), reason) == (2, "")


def test_no_driver_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "COMMAND", "nvidia-smi-that-is-not-there")
    assert find_gpus()[0] == ()
    assert "no driver of NVIDIA's is installed" in find_gpus()[1]


def test_a_driver_that_fails_gives_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    words = "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\nMake sure ..."
    monkeypatch.setattr(gpus.subprocess, "run", answering(words, 9))
    assert find_gpus() == ((), f"nvidia-smi: {words.splitlines()[0]}")


def test_a_driver_that_hangs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], *, timeout: float, **_: object) -> None:
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(gpus.subprocess, "run", run)
    assert "did not answer within 15 s: the driver hangs" in find_gpus()[1]
