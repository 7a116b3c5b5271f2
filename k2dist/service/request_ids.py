"""Ids of requests that came over HTTP: unique, dated, and bound to what was asked.

    chatcmpl-  6929a1f2  3c1f9be04d7a2e55  9f0c2b71
    prefix     seconds   chance            digest of the body

Nothing about a request is kept in a gateway, so the id itself says when it began and tells whether a POST
that wants to go on where another broke off asks for the same.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from typing import Any

from k2dist.errors import RequestError

_ID = re.compile(r"(?P<prefix>[a-z]+[-_])(?P<created>[0-9a-f]{8})[0-9a-f]{16}(?P<digest>[0-9a-f]{8})")


def new_id(prefix: str, fields: dict[str, Any], created: int) -> str:
    """`fields`: the body; `created`: seconds since 1970."""
    return f"{prefix}{created & 0xFFFFFFFF:08x}{secrets.token_hex(8)}{_digest(fields)}"


def created_of(request_id: str) -> int:
    return int(_parts(request_id)["created"], 16)


def check_same(request_id: str, prefix: str, fields: dict[str, Any]) -> None:
    """RequestError unless the id was made for this body."""
    parts = _parts(request_id)
    if parts["prefix"] != prefix or parts["digest"] != _digest(fields):
        raise RequestError("Last-Event-ID", "belongs to another request; send the same body again")


def _parts(request_id: str) -> re.Match[str]:
    parts = _ID.fullmatch(request_id)
    if parts is None:
        raise RequestError("Last-Event-ID", "not an id that this server gave")
    return parts


def _digest(fields: dict[str, Any]) -> str:
    """Of the body, whatever the order of its keys."""
    text = json.dumps(fields, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:8]
