"""Operations inside kernels that want care; most of it is what Triton's interpreter gets wrong.

It multiplies bfloat16 as if its bits were integers, and casts float32 to bfloat16 by cutting off. Done here
so that it is right there and unchanged on a device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from k2kernels.jit import INTERPRETED, jit

if TYPE_CHECKING:
    import triton.language as tl


@jit
def dot(a, b, acc):
    """a b + acc in float32; bfloat16 factors on the tensor core, float32 ones by fused multiply-adds."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@jit
def narrow(x, DTYPE: tl.constexpr):
    """float32 x in `DTYPE`, to the nearest, ties to even."""
    if INTERPRETED and DTYPE == tl.bfloat16:  # noqa: SIM300 - a constexpr must be asked, not the dtype
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = tl.where(x != x, x, bits.to(tl.float32, bitcast=True))
    return x.to(DTYPE)


@jit
def sigmoid(x):
    """1 / (1 + e^-x) for float32 x of either sign."""
    small = tl.exp(-tl.abs(x))
    return tl.div_rn(tl.where(x < 0, small, 1.0), 1.0 + small)
