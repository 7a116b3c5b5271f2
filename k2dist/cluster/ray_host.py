"""A Ray of our own on this machine: one process that starts it, and ends it in order.

    k2dist serve ──spawns, pipe──> ray_host ──ray.init──> gcs, raylet, agents, actors

The host ends Ray when it is told to (SIGTERM), or when the pipe to the process that started it closes,
however that process ended. Ray alone, when its driver is killed, leaves agents behind for a minute. A
detached host has no pipe. Ray reads its settings from the environment, so here, and only here, some are set.
"""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO

import msgspec
import psutil

from k2dist.cluster.process_mark import ProcessMark, find_process, mark_process
from k2dist.config.cluster import RayConfig
from k2dist.errors import CapacityError, PeerError
from k2dist.messages import Message

# A Ray of our own asks for Ray's token, since it listens on the machine's address and not only inside. All
# who join it need the same setting, before ray is imported. Whoever sets the variable decides otherwise.
JOIN_SETTINGS = {"RAY_AUTH_MODE": "token"}
_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # future behaviour; without it each process warns
    "RAY_DEDUP_LOGS": "0",
}
_FORGET_S = 30.0  # for a host that has not started yet: to start, and end in order


class HostProcess(Message, frozen=True, kw_only=True):
    """A host as others can find it."""

    address: str  # of its Ray
    log_dir: str  # where each of Ray's processes writes what it has to say
    mark: ProcessMark


@dataclass(frozen=True, slots=True)
class RayHost:
    """A host that this process has started. It ends with `stop`, and, unless detached, with this process."""

    process: HostProcess
    _child: subprocess.Popen[bytes]

    def stop(self, deadline_s: float) -> None:
        stop_host(self.process, deadline_s)
        _forget(self._child)


def start_host(config: RayConfig, *, is_detached: bool, deadline_s: float) -> RayHost:
    """Start Ray here. Errors: CapacityError with Ray's own last words, PeerError after `deadline_s`."""
    with tempfile.TemporaryFile() as words:
        child = subprocess.Popen(
            [sys.executable, "-m", __name__, msgspec.json.encode(config).decode()],
            stdin=subprocess.DEVNULL if is_detached else subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=words,
            start_new_session=True,  # a Ctrl-C in the terminal is for its starter alone
        )
        try:
            started = _first_line(child, deadline_s)
            if not started:
                words.seek(0)
                raise CapacityError(f"Ray did not start: {_last_words(words)}")
        except BaseException:
            child.terminate()
            _forget(child)
            raise
    return RayHost(msgspec.json.decode(started, type=HostProcess), child)


def _forget(child: subprocess.Popen[bytes]) -> None:
    """Wait for a child that has been told to end, and close what led to it."""
    try:
        child.wait(_FORGET_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            pipe.close()


def stop_host(process: HostProcess, deadline_s: float) -> None:
    """End a Ray and all its processes: in order within `deadline_s`, else by force. Gone already is fine."""
    found = find_process(process.mark)
    if found is None:
        return
    children = found.children(recursive=True)
    found.terminate()
    _, left = psutil.wait_procs([found, *children], timeout=deadline_s)
    for straggler in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            straggler.kill()


def _first_line(child: subprocess.Popen[bytes], deadline_s: float) -> bytes:
    """What the host prints once Ray is up; empty if it ended instead."""
    assert child.stdout is not None
    lines: list[bytes] = []
    output = child.stdout
    reading = threading.Thread(target=lambda: lines.append(output.readline()), daemon=True)
    reading.start()
    reading.join(deadline_s)
    if not lines:
        raise PeerError(f"Ray did not start within deadlines.start_s={deadline_s:g}")
    return lines[0]


def _last_words(words: IO[bytes]) -> str:
    lines = [line for line in words.read().decode(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "it gave no reason"


# -- the host's own process ----------------------------------------------------------------------------------


def main() -> None:
    """Hold Ray until the end. Signals come to this thread; Ray, which would take them over, has its own."""
    config = msgspec.json.decode(sys.argv[1], type=RayConfig)
    is_over = threading.Event()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: is_over.set())
    for name, value in {**JOIN_SETTINGS, **_SETTINGS}.items():
        os.environ.setdefault(name, value)
    with ThreadPoolExecutor(1, thread_name_prefix="ray") as thread:
        thread.submit(_hold_ray, config, is_over).result()


def _hold_ray(config: RayConfig, is_over: threading.Event) -> None:
    """Start Ray, print a HostProcess, wait, end Ray. Told to end while it starts, it first finishes starting:
    a Ray cut short leaves agents behind."""
    import ray  # reads the settings

    context = ray.init(
        address="local",
        num_cpus=config.num_cpus,
        object_store_memory=config.object_store_bytes,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    process = HostProcess(
        address=ray.get_runtime_context().gcs_address,
        log_dir=f"{context.address_info['session_dir']}/logs",
        mark=mark_process(),
    )
    print(msgspec.json.encode(process).decode(), flush=True)
    if stat.S_ISFIFO(os.fstat(sys.stdin.fileno()).st_mode):  # else detached: only SIGTERM ends it
        threading.Thread(target=_await_end_of_pipe, args=(is_over,), daemon=True).start()
    is_over.wait()
    ray.shutdown()


def _await_end_of_pipe(is_over: threading.Event) -> None:
    sys.stdin.buffer.read()
    is_over.set()


if __name__ == "__main__":
    main()
