"""A headless Chromium, driven over its debugging pipe: no driver, no package, no port.

parent ── fd 3: JSON, then a zero byte ──> chromium ── fd 4: the same ──> parent
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_FLAGS = (
    "--headless",
    "--remote-debugging-pipe",
    "--no-sandbox",  # as root
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1280,900",
)
_ANSWER_S = 30.0


class Page:
    """One page. Every method waits for its effect, `await_that` for anything else."""

    def __init__(self, browser: _Pipe, session: str) -> None:
        self._browser = browser
        self._session = session
        self.call("Page.enable")
        self.call("Runtime.enable")
        self.call("Log.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self._browser.call(method, params, self._session)

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.await_that("document.readyState === 'complete'")

    def value(self, expression: str) -> Any:
        """Of an expression in JavaScript."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def await_that(self, expression: str, timeout_s: float = 20.0) -> None:
        give_up_s = time.monotonic() + timeout_s
        while not self.value(expression):
            assert time.monotonic() < give_up_s, (
                f"never true: {expression}\n{self.value('document.body.innerText')}"
            )
            time.sleep(0.05)

    def type(self, text: str) -> None:
        """Into what has the focus."""
        self.call("Input.insertText", text=text)

    def press(self, key: str, code: int) -> None:
        for kind in ("keyDown", "keyUp"):
            text = {"text": "\r"} if key == "Enter" and kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, **text)

    def screenshot(self, path: Path) -> None:
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))

    def complaints(self) -> list[str]:
        """Errors and exceptions in its console so far, policy violations among them."""
        return self._browser.complaints


class _Pipe:
    """Commands out, answers and events in."""

    def __init__(self, write_fd: int, read_fd: int) -> None:
        self.complaints: list[str] = []
        self._write_fd, self._read_fd = write_fd, read_fd
        self._rest = b""
        self._number = 0

    def call(self, method: str, params: dict[str, Any], session: str | None = None) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        os.write(self._write_fd, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                result: dict[str, Any] = answer["result"]
                return result
            self._note(answer)

    def _note(self, event: dict[str, Any]) -> None:
        method, params = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.complaints.append(params["exceptionDetails"].get("exception", {}).get("description", ""))
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.complaints.append(params["entry"]["text"])

    def _read(self) -> dict[str, Any]:
        give_up_s = time.monotonic() + _ANSWER_S
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._read_fd], [], [], max(give_up_s - time.monotonic(), 0.0))
            assert ready, f"Chromium did not answer within {_ANSWER_S:g} s"
            data = os.read(self._read_fd, 2**16)
            assert data, "Chromium has ended"
            self._rest += data
        message, _, self._rest = self._rest.partition(b"\0")
        decoded: dict[str, Any] = json.loads(message)
        return decoded


@contextlib.contextmanager
def open_page(profile_dir: Path) -> Iterator[Page]:
    """A page of a browser of its own, which ends with the context."""
    assert CHROMIUM is not None, "no Chromium here"
    to_read, to_write = os.pipe()
    from_read, from_write = os.pipe()
    # bash puts the pipe's ends where Chromium wants them; numbers of ours might be 3 or 4 themselves.
    placed = f'exec "$0" "$@" 3<&{to_read} 4>&{from_write}'
    command = ["bash", "-c", placed, CHROMIUM, *_FLAGS, f"--user-data-dir={profile_dir}", "about:blank"]
    process = subprocess.Popen(
        command, pass_fds=(to_read, from_write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    os.close(to_read)
    os.close(from_write)
    try:
        pipe = _Pipe(to_write, from_read)
        target = pipe.call("Target.createTarget", {"url": "about:blank"})["targetId"]
        attached = pipe.call("Target.attachToTarget", {"targetId": target, "flatten": True})
        yield Page(pipe, attached["sessionId"])
    finally:
        process.kill()
        process.wait()
        os.close(to_write)
        os.close(from_read)
