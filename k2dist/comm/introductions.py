"""Ranks show each other their fingerprints before they build any group, over the generation's store.

Every rank sees all of them and comes to the same end, so that none waits for one that has refused.
"""

from __future__ import annotations

import logging

import msgspec
from torch.distributed import (  # type: ignore[attr-defined]  # the stubs do not re-export the stores
    DistError,
    PrefixStore,
    Store,
)

from k2dist.comm.roll_call import RollCall
from k2dist.errors import ConfigError, PeerError
from k2dist.ids import Generation
from k2dist.parallel.fingerprint import Difference, Introduction, differences

_HERE = "introduced"
_log = logging.getLogger(__name__)


def introduce(
    store: Store,
    own: Introduction,
    *,
    generation: Generation,
    num_ranks: int,
    allows_mix: bool,
    deadline_s: float,
) -> tuple[Difference, ...]:
    """Publish `own`, read all others', and return what differs where the config allows it to.

    Collective over the ranks 0 to `num_ranks` - 1. Errors: PeerError names who did not come; ConfigError the
    two ranks and the fields that differ, the same on every rank.
    """
    here = PrefixStore(f"k2dist/{generation}/introductions", store)
    try:
        here.set(str(own.world_rank), msgspec.json.encode(own).decode())
        _await_all(here, own.world_rank, num_ranks, deadline_s)
        texts = here.multi_get([str(rank) for rank in range(num_ranks)])
    except DistError as error:
        raise PeerError(f"introductions of generation {generation}: the rendezvous is silent") from error
    found = differences([msgspec.json.decode(text, type=Introduction) for text in texts])
    refused = found if not allows_mix else tuple(each for each in found if each.is_forbidden)
    if refused:
        raise ConfigError("; ".join([*map(str, refused), _remedy(refused)]))
    for each in found:
        _log.warning("ranks.mixed %s", each)
    return found


def _await_all(store: Store, world_rank: int, num_ranks: int, deadline_s: float) -> None:
    roll_call = RollCall(store, range(num_ranks), world_rank)
    roll_call.report(_HERE)
    absent = roll_call.absent(_HERE, deadline_s)
    if absent:
        names = ", ".join(map(str, absent))
        raise PeerError(f"rank {names} did not introduce itself within {deadline_s:g} s", absent)


def _remedy(refused: tuple[Difference, ...]) -> str:
    if any(each.is_forbidden for each in refused):
        return "such ranks cannot compute together: install the same k2dist and the same model on every node"
    return (
        "a request's tokens would depend on which of them computes it: make the nodes alike, or accept that "
        "with ranks.allow_mix: true"
    )
