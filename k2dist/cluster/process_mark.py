"""A process that can be found again: by pid, and by when it began, since pids are used again."""

from __future__ import annotations

import os

import psutil

from k2dist.messages import Message


class ProcessMark(Message, frozen=True, kw_only=True):
    """A process of this machine. `created_s`: seconds since the epoch."""

    pid: int
    created_s: float


def mark_process(pid: int | None = None) -> ProcessMark:
    """The mark of a living process, by default this one."""
    pid = os.getpid() if pid is None else pid
    return ProcessMark(pid=pid, created_s=psutil.Process(pid).create_time())


def find_process(mark: ProcessMark) -> psutil.Process | None:
    """The process if it lives."""
    try:
        found = psutil.Process(mark.pid)
        is_it = found.create_time() == mark.created_s and found.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return None
    return found if is_it else None
