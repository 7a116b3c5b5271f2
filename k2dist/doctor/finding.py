"""A finding: what was looked at, where, how bad it is, and what to do about it."""

from __future__ import annotations

import enum
from collections.abc import Iterable

from k2dist.messages import Message


class Level(enum.StrEnum):
    """`ERROR`: it cannot work so, or not as the config says. `WARNING`: it may, worse than it could."""

    OK = "ok"
    WARNING = "warning"
    ERROR = "error"


class Finding(Message, frozen=True, kw_only=True):
    """`node`: "" if it is about all of them. `remedy`: who has to do what; "" if nothing is to be done."""

    check: str
    level: Level
    what: str
    node: str = ""
    remedy: str = ""

    def __str__(self) -> str:
        where = f"{self.node}: " if self.node else ""
        return f"{self.check}: {where}{self.what}" + (f"; {self.remedy}" if self.remedy else "")


def ok(check: str, what: str, node: str = "") -> Finding:
    return Finding(check=check, level=Level.OK, what=what, node=node)


def warning(check: str, what: str, remedy: str, node: str = "") -> Finding:
    return Finding(check=check, level=Level.WARNING, what=what, node=node, remedy=remedy)


def error(check: str, what: str, remedy: str, node: str = "") -> Finding:
    return Finding(check=check, level=Level.ERROR, what=what, node=node, remedy=remedy)


def errors_of(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    return tuple(finding for finding in findings if finding.level is Level.ERROR)


def warnings_of(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    return tuple(finding for finding in findings if finding.level is Level.WARNING)
