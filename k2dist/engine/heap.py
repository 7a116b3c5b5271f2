"""What was freed goes back to the system: glibc keeps holes between what stays (a load leaves many)."""

from __future__ import annotations

import ctypes


def release_freed_memory() -> None:
    """Where the C library can; elsewhere nothing is done."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
