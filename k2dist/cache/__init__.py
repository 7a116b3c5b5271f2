"""Pages of the latent cache: who holds which. Pure bookkeeping; the bytes live in `model/latent_cache.py`."""

from k2dist.cache.pages import PagePool

__all__ = ["PagePool"]
