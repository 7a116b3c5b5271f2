"""What this machine gives today: the denominators of every share."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from k2kernels.bench.timing import Clock
from k2kernels.cost import Cost

# Bytes of a large tensor, and the side of a large square matrix.
_SIZES = {"cuda": (4 << 30, 8192), "cpu": (256 << 20, 1024)}


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Measured rates. e4m3 products are held against twice the bfloat16 rate on a device that has them."""

    read_gb_s: float
    copy_gb_s: float
    bfloat16_tflop_s: float
    e4m3_factor: float

    def floor_s(self, cost: Cost, *, is_e4m3: bool) -> tuple[float, str]:
        """The least time that `cost` allows, and what sets it."""
        rate = self.bfloat16_tflop_s * (self.e4m3_factor if is_e4m3 else 1.0)
        bytes_s, flops_s = cost.num_bytes / (self.read_gb_s * 1e9), cost.num_flops / (rate * 1e12)
        return (bytes_s, "bytes") if bytes_s >= flops_s else (flops_s, "flops")

    def best(self, other: Ceilings) -> Ceilings:
        """Of two measurements: what something else on the machine took from one, the other may have had."""
        return Ceilings(
            max(self.read_gb_s, other.read_gb_s),
            max(self.copy_gb_s, other.copy_gb_s),
            max(self.bfloat16_tflop_s, other.bfloat16_tflop_s),
            self.e4m3_factor,
        )


def measure_ceilings(clock: Clock) -> Ceilings:
    """The best of several ways to read, since the limit is wanted; the median time of each."""
    device = clock.device
    num_bytes, side = _SIZES[device.type]
    x = torch.ones(num_bytes // 4, dtype=torch.float32, device=device)
    y = torch.empty_like(x)
    read_s = min(clock.median_s(x.sum), clock.median_s(x.max))
    copy_s = clock.median_s(lambda: y.copy_(x))
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    matmul_s = clock.median_s(lambda: a @ b)
    return Ceilings(
        read_gb_s=num_bytes / read_s / 1e9,
        copy_gb_s=2 * num_bytes / copy_s / 1e9,
        bfloat16_tflop_s=2 * side**3 / matmul_s / 1e12,
        e4m3_factor=2.0 if device.type == "cuda" and torch.cuda.get_device_capability() >= (8, 9) else 1.0,
    )
