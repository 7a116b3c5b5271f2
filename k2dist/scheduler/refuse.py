"""Which requests a lane can never serve, and what their sender should change."""

from __future__ import annotations

import math

from k2dist.cache import PagePool
from k2dist.errors import RequestError
from k2dist.messages import Request
from k2dist.scheduler.limits import Limits

MAX_PRIORITY = 2**31 - 1  # as far as the wire goes


def refuse_impossible(request: Request, limits: Limits, pages: PagePool, max_positions: int) -> None:
    """Raise `RequestError` for a request that this lane could not finish even if it were alone.

    The full length of an output is prompt + max_tokens, or `max_positions` if that is less; all of it must
    fit into the lane's pages at once, or the output would stop half way for want of a page.
    """
    prompt_len, max_tokens = len(request.prompt), request.sampling.max_tokens
    if prompt_len == 0:
        raise RequestError("prompt", "is empty; give at least one token")
    if prompt_len >= max_positions:
        raise RequestError(
            "prompt", f"{prompt_len} tokens leave no room in a context of {max_positions}; shorten it"
        )
    if max_tokens < 1:
        raise RequestError("sampling.max_tokens", f"{max_tokens}: ask for at least 1")
    if not 1 <= request.num_outputs <= limits.max_waiting:
        raise RequestError("num_outputs", f"{request.num_outputs}: use 1 to {limits.max_waiting}")
    if not -MAX_PRIORITY <= request.priority <= MAX_PRIORITY:
        raise RequestError("priority", f"{request.priority}: use {-MAX_PRIORITY} to {MAX_PRIORITY}")
    if request.timeout_s is not None and not 0 < request.timeout_s < math.inf:
        raise RequestError("timeout_s", f"{request.timeout_s}: use a number of seconds, or leave it out")
    for output_index in request.generated:
        if not 0 <= output_index < request.num_outputs:
            raise RequestError(
                "generated", f"output {output_index} does not exist; there are {request.num_outputs}"
            )
    _refuse_unfitting(prompt_len, min(max_tokens, max_positions - prompt_len), pages)


def _refuse_unfitting(prompt_len: int, max_new: int, pages: PagePool) -> None:
    num_pages = pages.pages_for(prompt_len + max_new)
    if num_pages > pages.num_pages:
        prompt_fits = pages.pages_for(prompt_len + 1) <= pages.num_pages
        raise RequestError(
            "sampling.max_tokens" if prompt_fits else "prompt",
            f"{prompt_len} prompt tokens + {max_new} to generate = {prompt_len + max_new} tokens need "
            f"{num_pages} pages of {pages.page_tokens}, and the lane has {pages.num_pages}; ask for less, "
            f"or raise cache.num_pages",
        )
