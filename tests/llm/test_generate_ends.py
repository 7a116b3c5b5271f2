"""`k2dist generate` as a process: its reader goes away, or Ctrl-C is pressed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

WAIT_S = 60


@contextmanager
def generating(model_dir: Path, prompts: Path) -> Iterator[subprocess.Popen[str]]:
    """Far more prompts than are answered in the time of a test."""
    prompts.write_text("abc\n" * 20_000)
    options = ["--model", str(model_dir), "--file", str(prompts), "--max-tokens", "1"]
    command = [sys.executable, "-m", "k2dist", "generate", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def first_line(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert json.loads(process.stdout.readline())["index"] == 0


def test_a_reader_that_leaves_ends_it_quietly(tiny_model_dir: Path, tmp_path: Path) -> None:
    """`k2dist generate ... | head -1`."""
    with generating(tiny_model_dir, tmp_path / "prompts") as process:
        first_line(process)
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.wait(WAIT_S) == 1
        assert process.stderr.read() == ""


def test_ctrl_c_ends_it_with_what_it_has_written(tiny_model_dir: Path, tmp_path: Path) -> None:
    with generating(tiny_model_dir, tmp_path / "prompts") as process:
        first_line(process)
        process.send_signal(signal.SIGINT)
        assert process.stdout is not None
        assert process.stderr is not None
        stdout = process.stdout.read()  # not `communicate`, which forgets what `readline` has buffered
        assert (process.wait(WAIT_S), process.stderr.read()) == (130, "")
        written = [json.loads(line)["index"] for line in stdout.splitlines()]
        assert written == list(range(1, 1 + len(written))), "whole lines, in order"
