"""A checkpoint's own chat template, rendered in a process of its own within bounds of time and memory.

A template is a program. Jinja's sandbox keeps it from files and from Python's insides, but not from going on
for ever or filling the memory; a process can be ended, and what it did is gone with it.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from k2dist.errors import CheckpointError, RequestError
from k2dist.service import template_child
from k2dist.service.template_child import read_frame, write_frame

RENDER_S = 5.0  # a conversation of 16 MiB takes a tenth of it
_START_S = 30.0  # for an interpreter to start on a busy machine
_REMEDY = "; correct it, or use k2dist's own with service.chat_template: built-in"


class TemplateProcess:
    """One template. Any thread may call; one conversation is rendered at a time. Close it after use."""

    def __init__(self, path: Path) -> None:
        """CheckpointError: no such file, or no template."""
        self._path = path
        try:
            self._source = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path}: {error}{_REMEDY}") from error
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        with self._lock:
            try:
                self._start()
            except BaseException:
                self._end()
                raise

    def close(self) -> None:
        with self._lock:
            self._end()

    def render(self, context: dict[str, Any]) -> str:
        """RequestError: the template refuses it. CheckpointError: the template breaks on it, or loops."""
        with self._lock:
            if self._process is None:
                self._start()
            return self._ask(context, RENDER_S)

    def _start(self) -> None:
        # As a file and not as a module: k2dist's packages would take it a second and 60 MB.
        command = [sys.executable, "-P", template_child.__file__]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._ask(self._source, _START_S)

    def _ask(self, value: object, deadline_s: float) -> str:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        timer = threading.Timer(deadline_s, process.kill)
        timer.start()
        try:
            write_frame(process.stdin, value)
            answer: dict[str, str] = read_frame(process.stdout)
        except (OSError, EOFError) as error:
            is_late = not timer.is_alive()
            self._end()
            what = f"no prompt within {deadline_s:g} s: it loops" if is_late else "its process has died"
            raise CheckpointError(f"{self._path}: {what}{_REMEDY}") from error
        finally:
            timer.cancel()
        if "refused" in answer:
            raise RequestError("messages", f"the model's chat template refuses them: {answer['refused']}")
        if "broken" in answer:
            raise CheckpointError(f"{self._path}: {answer['broken']}{_REMEDY}")
        return answer["text"]

    def _end(self) -> None:
        if self._process is None:
            return
        process, self._process = self._process, None
        process.kill()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    continue  # what was still to be written has no reader any more
        process.wait()
