"""What every launcher checks before a kernel addresses memory by itself: the message names the argument."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.bfloat16, torch.float32)
E4M3 = (torch.float8_e4m3fn,)
INT64 = (torch.int64,)
FLOAT32 = (torch.float32,)


HOPPER = (9, 0)
# Bytes of shared memory that one program may have, by compute capability (CUDA C++ Programming Guide, its
# technical specifications: 99, 163 and 227 KB); where it is not told, as on Hopper.
SHARED_BYTES = {(8, 0): 163 << 10, (8, 6): 99 << 10, (8, 9): 99 << 10, (12, 0): 99 << 10, (12, 1): 99 << 10}


def capability(device: torch.device) -> tuple[int, int]:
    """Of the machine that kernels are compiled for; without one, what tiles are chosen for."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else HOPPER


def shared_bytes(device: torch.device) -> int:
    return SHARED_BYTES.get(capability(device), 227 << 10)


def require(is_so: bool, message: str) -> None:
    """ValueError(message) unless `is_so`. Not an assertion: a kernel would write where it should not."""
    if not is_so:
        raise ValueError(message)


def check_tensor(
    name: str,
    x: Tensor,
    shape: tuple[int | None, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
    *,
    dense_axes: int = 1,
) -> None:
    """`x` is as a kernel takes it; its last `dense_axes` axes have no gaps in memory. None: any length."""
    is_shape = x.dim() == len(shape) and all(
        wanted is None or n == wanted for n, wanted in zip(x.shape, shape, strict=True)
    )
    if not is_shape:
        wanted_shape = ", ".join("any" if wanted is None else str(wanted) for wanted in shape)
        raise ValueError(f"{name}: shape {list(x.shape)}, expected [{wanted_shape}]")
    if x.dtype not in dtypes:
        raise ValueError(f"{name}: {x.dtype}, expected {' or '.join(str(dtype) for dtype in dtypes)}")
    if x.device != device:
        raise ValueError(f"{name}: on {x.device}, the other tensors on {device}")
    expected = 1
    for n, stride in zip(reversed(x.shape[-dense_axes:]), reversed(x.stride()[-dense_axes:]), strict=True):
        if n > 1 and stride != expected and x.numel():
            raise ValueError(
                f"{name}: strides {list(x.stride())} of shape {list(x.shape)}; "
                f"the last {dense_axes} axes must be contiguous"
            )
        expected *= n
