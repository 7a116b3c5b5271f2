"""Pages of the latent cache: who holds which, and what they hold. Their bytes: `model/latent_cache.py`."""

from k2dist.cache.pages import PagePool
from k2dist.cache.prefix import PageKey, next_key, page_keys

__all__ = ["PageKey", "PagePool", "next_key", "page_keys"]
