"""Which kernels a rank uses: the names a config may give, and what `auto` means on this machine."""

import torch
from k2kernels import KernelSet

from k2dist.errors import ConfigError

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


CPU = torch.device("cpu")


def select_kernels(name: str, dtype: str, device: torch.device = CPU) -> KernelSet:
    """The kernel set called `name`, for a residual stream of `dtype` and weights on `device`."""
    if dtype not in _DTYPES:
        raise ConfigError(f"dtype={dtype!r}: use one of {', '.join(_DTYPES)}")
    if name not in ("auto", "reference", "triton"):
        raise ConfigError(f"kernels={name!r}: use 'auto', 'reference' or 'triton'")
    if name == "triton" or (name == "auto" and device.type == "cuda"):
        return KernelSet.triton(_DTYPES[dtype])
    return KernelSet.reference(_DTYPES[dtype])
