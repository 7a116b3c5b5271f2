"""Which coordinator has a request: its id says so, to every coordinator alike.

    c1-4bf6...  drawn by coordinator 1           anything else: a hash of it, modulo the number of
    coordinators

So an id that a client chose leads every coordinator to the same one, where a repeated request meets its twin.
"""

from __future__ import annotations

import re
from hashlib import blake2b

_DRAWN = re.compile(r"c(?P<home>[0-9]{1,4})-")


def home_of(request_id: str, num_coordinators: int) -> int:
    """The number of the coordinator that has this request, from 0."""
    drawn = _DRAWN.match(request_id)
    if drawn is not None and int(drawn["home"]) < num_coordinators:
        return int(drawn["home"])
    digest = blake2b(request_id.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") % num_coordinators


def new_request_id(home: int, unique: str) -> str:
    """An id that names coordinator `home`; `unique`: what makes it the only one, such as a UUID4."""
    return f"c{home}-{unique}"
