"""Rounding to float8 e4m3 in float32 and integer arithmetic, inside a kernel: the same bits wherever it runs.

Triton's interpreter casts float32 to e4m3 wrongly where rounding crosses a power of two (7.99 gives 4), and
NaN gives 384. So a value is brought onto the grid in float32, and its byte is put together from the bits.

    step = 2^(max(exponent, -6) - 3): 3 bits behind the point; below 2^-6 the grid is even
    (x + 1.5 * 2^23 step) - 1.5 * 2^23 step: the addition rounds to the nearest multiple of step, ties to even
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from k2kernels.jit import jit

if TYPE_CHECKING:
    import triton.language as tl


@jit
def e4m3_byte(x):
    """The byte of the nearest e4m3 number to float32 x, clamped to +-448; NaN gives NaN. int32 0..255."""
    bits = x.to(tl.int32, bitcast=True)
    is_nan = x != x
    size = tl.where(is_nan, 0.0, tl.minimum(tl.abs(x), 448.0))
    exponent = tl.maximum((size.to(tl.int32, bitcast=True) >> 23) - 127, -6)
    anchor = ((exponent - 3 + 23 + 127) << 23).to(tl.float32, bitcast=True) * 1.5
    size = (size + anchor) - anchor
    normal = (size.to(tl.int32, bitcast=True) >> 20) - ((127 - 7) << 3)
    subnormal = (size * 512.0).to(tl.int32)  # a multiple of 2^-9 below 2^-6
    byte = tl.where(size < 0.015625, subnormal, normal)
    return tl.where(is_nan, 127, byte) | ((bits >> 24) & 0x80)


@jit
def group_scale(x, amax_floor):
    """The scale of each row of float32 x [groups, channels]: max(|x|, floor) / 448; NaN if one is there."""
    amax = tl.maximum(tl.max(tl.abs(x), axis=1), amax_floor)
    has_nan = tl.max((x != x).to(tl.int32), axis=1) > 0
    return tl.where(has_nan, float("nan"), tl.div_rn(amax, 448.0))
