"""A rank's part of a checkpoint that does not exist: the tensors of a shard plan, made up on the device.

To draw a hundred billion random numbers takes minutes, to copy them a second: values are drawn once, into a
pool of 2^22 and some, and every tensor is a run of it in its dtype, from a place that follows from its name.

Before their scales, float8 weights have a quarter of the largest float8 for a standard deviation, about as
after quantising.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable

import torch
from torch import Tensor

from k2dist.checkpoint.quantise import E4M3_MAX
from k2dist.checkpoint.random_weights import spread
from k2dist.parallel.published import SCALE_SUFFIX
from k2dist.parallel.shard_plan import TensorRead

_POOL_SIZE = 2**22 + 15  # a prime: no row of a weight is the one before it
_FLOAT8_DEVIATION = E4M3_MAX / 4
_DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32}  # by safetensors' names


class RandomShard:
    """Tensors of published dtypes and of this rank's shapes. Equal seeds and devices give equal tensors."""

    def __init__(self, scale_block: int | None, device: torch.device, seed: int = 0) -> None:
        self._scale_block = scale_block
        self._device = device
        generator = torch.Generator(device).manual_seed(seed)
        pool = torch.randn(_POOL_SIZE, generator=generator, device=device)
        self._pools = {torch.float32: pool, torch.bfloat16: pool.to(torch.bfloat16)}
        scaled = (pool * _FLOAT8_DEVIATION).clamp_(-E4M3_MAX, E4M3_MAX)
        self._float8_pool = scaled.to(torch.float8_e4m3fn).view(torch.uint8)

    def tensors(self, reads: Iterable[TensorRead]) -> dict[str, Tensor]:
        """By published name, as `load_shard` gives them."""
        return {read.name: self._tensor(read) for read in reads}

    def normal(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Values of mean 0 and standard deviation 1, bfloat16 or float32."""
        x = torch.empty(shape, dtype=dtype, device=self._device)
        _fill(x.view(-1), self._pools[dtype], name)
        return x

    def _tensor(self, read: TensorRead) -> Tensor:
        if read.dtype == "F8_E4M3":
            x = torch.empty(read.cut_shape, dtype=torch.float8_e4m3fn, device=self._device)
            _fill(x.view(torch.uint8).view(-1), self._float8_pool, read.name)
            return x
        if read.name.endswith(SCALE_SUFFIX):
            return self._scales(read)
        mean, deviation = spread(read.name, read.shape)
        return self.normal(read.name, read.cut_shape, _DTYPES[read.dtype]).mul_(deviation).add_(mean)

    def _scales(self, read: TensorRead) -> Tensor:
        """So that the weights have the deviation of a linear with as many inputs, give or take a half."""
        assert self._scale_block is not None, f"{read.name}: of a model without scales"
        deviation = 1.0 / math.sqrt(read.shape[1] * self._scale_block)
        unit = self.normal(read.name, read.cut_shape, torch.float32)
        return unit.mul_(0.25).clamp_(-0.5, 0.5).add_(1.0).mul_(deviation / _FLOAT8_DEVIATION)


def _fill(x_N: Tensor, pool_P: Tensor, name: str) -> None:
    """From the pool's place for `name` on, and then the pool over and over."""
    place = zlib.crc32(name.encode()) % len(pool_P)
    done = min(len(pool_P) - place, len(x_N))
    x_N[:done] = pool_P[place : place + done]
    for first in range(done, len(x_N), len(pool_P)):
        run_N = x_N[first : first + len(pool_P)]
        run_N[:] = pool_P[: len(run_N)]
