"""What a full page holds, said in 32 bytes: a key that chains the page's tokens to all tokens before them.

key[i] = blake2b(key[i-1] + tokens of page i)      key[-1] = blake2b(tenant)

A latent depends on every token up to its position, so equal keys mean equal latents. The tenant is the salt:
no tenant can find, or time, what another one has cached. Keys are compared within one lane only.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import NewType

PageKey = NewType("PageKey", bytes)

_KEY_BYTES = 32  # two prompts of equal key are out of reach: 2**128 trials


def root_key(tenant: str) -> PageKey:
    """The key before the first page of any of the tenant's sequences."""
    return PageKey(blake2b(tenant.encode("utf-8", "surrogatepass"), digest_size=_KEY_BYTES).digest())


def next_key(parent: PageKey, token_ids: Sequence[int]) -> PageKey:
    """The key of a page that holds `token_ids` (each below 2**63) and follows the page of key `parent`."""
    return PageKey(blake2b(parent + array("q", token_ids).tobytes(), digest_size=_KEY_BYTES).digest())


def page_keys(tenant: str, token_ids: Sequence[int], page_tokens: int) -> Iterator[PageKey]:
    """The keys of the full pages of `token_ids`, in order, each hashed only when it is asked for."""
    key = root_key(tenant)
    for end in range(page_tokens, len(token_ids) + 1, page_tokens):
        key = next_key(key, token_ids[end - page_tokens : end])
        yield key
