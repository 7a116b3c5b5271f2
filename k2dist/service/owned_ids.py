"""A request's name inside k2dist, where ids of all callers meet: with the API key's id in it.

    "r" of key 3f9a0c5d1e22  ──inner_id──>  "3f9a0c5d1e22·r"  ──outer_id──>  "r"

So no key can find a request of another, collide with it, or learn that there is one.
"""

from __future__ import annotations

from k2dist.ids import RequestId

_MARK = "·"  # no client's id has it: they are ASCII


def inner_id(key_id: str, request_id: str) -> RequestId:
    """`key_id` is empty where no keys are asked for."""
    return RequestId(f"{key_id}{_MARK}{request_id}" if key_id else request_id)


def outer_id(request_id: str) -> str:
    """The request's name as its client knows it."""
    return request_id.rpartition(_MARK)[2]
