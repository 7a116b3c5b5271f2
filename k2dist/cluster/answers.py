"""An answer of one of a cluster's own processes, with a deadline; how such a process fails, in one place."""

from __future__ import annotations

import asyncio
from typing import Any

from ray.exceptions import RayActorError, RayTaskError

from k2dist.errors import K2Error, PeerError


async def answer(ref: Any, timeout_s: float, who: str) -> Any:
    """What the call gives. PeerError: `who` died, or did not answer in time. Its own K2Errors as they are."""
    try:
        return await asyncio.wait_for(ref, timeout_s)
    except TimeoutError as error:
        raise PeerError(f"{who} did not answer within {timeout_s:g} s") from error
    except RayActorError as error:
        raise PeerError(f"{who} died") from error
    except RayTaskError as error:
        if isinstance(error.cause, K2Error):
            raise error.cause from None
        raise
