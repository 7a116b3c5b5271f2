"""API keys: what one looks like, and the file that knows them by their hashes.

    k2_3f9a0c5d1e22_<43 characters>        id, which may be shown and logged; secret, 256 random bits

    - id: 3f9a0c5d1e22                     the file: a YAML list; `python -m k2dist.service.new_key` adds to
    it
      sha256: 5d41...                      of the whole key
      tenant: research
      role: client                         client: generates; monitor: reads metrics; operator: all, Drain too
      requests_per_minute: 600             none: no limit
      tokens_per_minute: 200000
      max_priority: 0

SHA-256 and not bcrypt: a slow hash protects what people think up, by making each guess dear. 256 random bits
cannot be guessed at any speed, while a tenth of a second of CPU for each request would be a gift to whoever
wants to keep the server busy. So keys are drawn here and never chosen.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import yaml
from msgspec import Meta

from k2dist.coordinator.rate import PerMinute, RateLimit
from k2dist.errors import ConfigError, UsageError
from k2dist.messages import Message

Role = Literal["client", "monitor", "operator"]

_KEY = re.compile(r"k2_(?P<id>[0-9a-z]{1,32})_[A-Za-z0-9_-]{43}")
_NOBODYS = hashlib.sha256(
    b""
).hexdigest()  # compared with where there is no such id, so that it takes as long


class KeyEntry(Message, frozen=True, kw_only=True):
    """One key as the file states it."""

    id: Annotated[str, Meta(pattern=r"^[0-9a-z]{1,32}$")]
    sha256: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$")]
    # Whose it is: tenants take turns, and none finds the other's prompts in the cache.
    tenant: Annotated[str, Meta(min_length=1, max_length=100)]
    role: Role = "client"
    requests_per_minute: PerMinute | None = None
    tokens_per_minute: PerMinute | None = None
    max_priority: int = 0  # a request of it may have this priority at most

    @property
    def limit(self) -> RateLimit:
        return RateLimit(
            requests_per_minute=self.requests_per_minute, tokens_per_minute=self.tokens_per_minute
        )


class KeyTable:
    """The keys of one file, to be looked up."""

    def __init__(self, entries: Sequence[KeyEntry]) -> None:
        self.entries = {entry.id: entry for entry in entries}

    def find(self, key: str) -> KeyEntry | None:
        """The entry of this key; None if it is none of them. How long it takes says nothing of the secret."""
        parts = _KEY.fullmatch(key)
        entry = self.entries.get(parts["id"]) if parts is not None else None
        is_it = hmac.compare_digest(_digest(key), entry.sha256 if entry is not None else _NOBODYS)
        return entry if is_it else None


def new_key(key_id: str = "") -> tuple[str, str]:
    """A key that nobody has, and its hash for the file. `key_id`: drawn if empty."""
    key = f"k2_{key_id or secrets.token_hex(6)}_{secrets.token_urlsafe(32)}"
    return key, _digest(key)


def key_id(key: str) -> str:
    parts = _KEY.fullmatch(key)
    assert parts is not None, "a key of `new_key`"
    return parts["id"]


def read_key_file(path: Path) -> str:
    """The key that a client keeps in a file. UsageError: there is none in it."""
    try:
        return check_key(path.read_text(encoding="utf-8"), f"--api-key-file {path}")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--api-key-file {path}: cannot be read ({error})") from error


def check_key(text: str, source: str) -> str:
    """A key without the line end that files have; it goes into a header, which takes no other characters.
    UsageError names the source and does not show the text."""
    text = text.strip()
    if not text.isascii() or not text.isprintable() or " " in text:
        raise UsageError(f"{source}: not an API key; give one line of printable ASCII")
    return text


def read_keys(path: str) -> KeyTable:
    """The file's keys. ConfigError names the file, the entry and the field."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        document = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"service.api_keys={path!r}: cannot be read ({error})") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"service.api_keys={path!r}: not YAML: {' '.join(str(error).split())}") from error
    return parse_keys(document if document is not None else [], f"service.api_keys={path!r}")


def parse_keys(document: Any, source: str) -> KeyTable:
    try:
        entries = msgspec.convert(document, list[KeyEntry])
    except msgspec.ValidationError as error:
        raise ConfigError(
            f"{source}: {error}; see k2dist/service/api_keys.py for what an entry has"
        ) from error
    for name in ("id", "sha256"):
        values = [getattr(entry, name) for entry in entries]
        twice = next((value for value in values if values.count(value) > 1), None)
        if twice is not None:
            raise ConfigError(f"{source}: two entries have {name} {twice}; remove one")
    return KeyTable(entries)


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
