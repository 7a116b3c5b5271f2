"""Log lines as events with fields: `log.info("lane.preempted", seq_id=7, pages=12)`. Pure but for `logging`.

    text   2026-11-28 14:02:11.093 INFO    lane.preempted seq_id=7 pages=12
    json   {"at":"2026-11-28T14:02:11.093Z","level":"info","event":"lane.preempted","seq_id":7,"pages":12}

An event is a constant, so that it can be searched for; all that varies is a field. Never a prompt, an answer
or a key; none per token.
"""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from typing import Any, Literal

import msgspec

_FIELDS = "k2dist_fields"
_ENCODE = msgspec.json.Encoder(enc_hook=str).encode


class EventLog:
    """A logger whose messages are events."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger

    def debug(self, event: str, **fields: Any) -> None:
        self._tell(logging.DEBUG, event, fields, None)

    def info(self, event: str, **fields: Any) -> None:
        self._tell(logging.INFO, event, fields, None)

    def warning(self, event: str, **fields: Any) -> None:
        self._tell(logging.WARNING, event, fields, None)

    def error(self, event: str, **fields: Any) -> None:
        self._tell(logging.ERROR, event, fields, None)

    def bug(self, event: str, error: BaseException, **fields: Any) -> None:
        """What nobody foresaw, with its traceback."""
        self._tell(logging.CRITICAL, event, fields, error)

    def _tell(self, level: int, event: str, fields: dict[str, Any], error: BaseException | None) -> None:
        if self._logger.isEnabledFor(level):
            self._logger.log(level, event, extra={_FIELDS: fields}, exc_info=error)


class EventFormatter(logging.Formatter):
    """One line an event; `process`: what is added to each, such as which rank it is."""

    def __init__(self, form: Literal["text", "json"], process: dict[str, Any] | None = None) -> None:
        super().__init__()
        self._form = form
        self._process = process or {}

    def format(self, record: logging.LogRecord) -> str:
        fields = {**self._process, **getattr(record, _FIELDS, {})}
        at = datetime.fromtimestamp(record.created, UTC)
        trace = self.formatException(record.exc_info) if record.exc_info else ""
        if self._form == "json":
            line = {
                "at": at.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
                "level": record.levelname.lower(),
                "event": record.getMessage(),
                "logger": record.name,
                **fields,
            }
            return _ENCODE(line | ({"traceback": trace} if trace else {})).decode()
        shown = "".join(f" {name}={_text(value)}" for name, value in fields.items())
        head = f"{at:%Y-%m-%d %H:%M:%S}.{int(record.msecs):03d} {record.levelname:<8}"
        return f"{head} {record.getMessage()}{shown}" + (f"\n{trace}" if trace else "")


def set_up_logs(level: str, form: Literal["text", "json"], **process: Any) -> None:
    """Let this process's k2dist loggers write to stderr, as `config.observe` says. Called by entry points, in
    place of what they set up before."""
    logger = logging.getLogger("k2dist")
    for handler in [handler for handler in logger.handlers if isinstance(handler.formatter, EventFormatter)]:
        logger.removeHandler(handler)
    handler = logging.StreamHandler()
    handler.setFormatter(EventFormatter(form, process))
    logger.addHandler(handler)
    logger.setLevel(level.upper())


def _text(value: Any) -> str:
    """As it is where that is one word; else as JSON."""
    text = str(value)
    plain = text and not any(c in ' "=\n\t' for c in text) and text.isprintable()
    return text if plain else _ENCODE(value).decode()
