"""Which kernels a rank uses: the names a config may give, and what `auto` means on this machine."""

import torch
from k2kernels import KernelSet

from k2dist.errors import ConfigError

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def select_kernels(name: str, dtype: str) -> KernelSet:
    """The kernel set called `name`, for a residual stream of `dtype`."""
    if dtype not in _DTYPES:
        raise ConfigError(f"dtype={dtype!r}: use one of {', '.join(_DTYPES)}")
    if name not in ("auto", "reference"):
        raise ConfigError(f"kernels={name!r}: use 'auto' or 'reference'")
    return KernelSet.reference(_DTYPES[dtype])
