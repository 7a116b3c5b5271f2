"""What the references are built from, so that a row's bits depend on that row alone.

Plain torch breaks that in three places, and here is what stands in for each:

    matrix products   another number of rows takes other instructions    tiles of 16 rows, the last padded
    sums              the order of the addends follows the shape         neighbours in pairs, then their sums
    sigmoid, exp      a tensor's tail is computed by another routine     +, x and round, each exactly rounded

Max, sort, square root and division are exact or correctly rounded everywhere, and need nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

TILE_ROWS = 16

_LOG2_E = 1.44269504
_LN2_HIGH = 0.693359375  # nine bits: its product with an integer below 2**15 is exact
_LN2_LOW = -2.12194440e-4
# exp(r) = 1 + r + r^2 * polynomial(r) on |r| <= ln(2) / 2, highest power first (Moshier, Cephes, expf.c).
_EXP_TERMS = (
    1.9875691500e-4,
    1.3981999507e-3,
    8.3334519073e-3,
    4.1665795894e-2,
    1.6666665459e-1,
    5.0000001201e-1,
)
_SMALLEST_EXPONENT = -87.0  # e^-87 is a normal float32; what lies below is given as 0


def tiled_matmul(x_TK: Tensor, w_NK: Tensor) -> Tensor:
    """x w^T in float32, [T, N], in products of exactly 16 rows. w: float32. T may be 0.

    The weights are the left factor. As the right one MKL shares K among threads, and a row's bits change with
    their number, though never with its company (in 25 of 28 cases with K >= 1536; this way round in none of
    K2's shapes). It is also the faster way, by 0 to 40%.
    """
    y_TN = torch.empty(len(x_TK), len(w_NK), dtype=torch.float32, device=x_TK.device)
    for first in range(0, len(x_TK), TILE_ROWS):
        tile_IK = padded_rows(x_TK[first : first + TILE_ROWS].float(), TILE_ROWS)
        y_TN[first : first + TILE_ROWS] = (w_NK @ tile_IK.T.contiguous()).T[: len(x_TK) - first]
    return y_TN


def padded_rows(x: Tensor, num_rows: int) -> Tensor:
    """`x` with zeros after its rows, up to `num_rows` of them."""
    missing = num_rows - len(x)
    return x if missing == 0 else torch.cat((x, x.new_zeros(missing, *x.shape[1:])))


def tree_sum(x: Tensor, dim: int) -> Tensor:
    """The sum over `dim`: neighbours in pairs, then neighbouring sums, and so on.

    Zeros appended along `dim` change nothing, so a sum over a padded axis has the bits of the unpadded one.
    An empty axis sums to 0.
    """
    x = x.movedim(dim, -1)
    if x.shape[-1] == 0:
        return x.new_zeros(x.shape[:-1])
    while x.shape[-1] > 1:
        x = x if x.shape[-1] % 2 == 0 else pad(x, (0, 1))
        x = x[..., 0::2] + x[..., 1::2]
    return x[..., 0]


def exp_of_negative(x: Tensor) -> Tensor:
    """e^x for float32 x <= 0, within 2 units in the last place; 0 below -87, so for minus infinity too."""
    assert x.dtype == torch.float32, f"float32 only, not {x.dtype}"
    bounded = x.clamp_min(_SMALLEST_EXPONENT)
    power = (bounded * _LOG2_E).round()
    rest = bounded - power * _LN2_HIGH - power * _LN2_LOW
    polynomial = torch.full_like(rest, _EXP_TERMS[0])
    for term in _EXP_TERMS[1:]:
        polynomial = polynomial.mul_(rest).add_(term)
    mantissa = polynomial.mul_(rest).mul_(rest).add_(rest).add_(1.0)
    two_to_power = ((power.to(torch.int32) + 127) << 23).view(torch.float32)
    return torch.where(x < _SMALLEST_EXPONENT, 0.0, mantissa * two_to_power)


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + e^-x) for float32 x of either sign."""
    small = exp_of_negative(-x.abs())
    return torch.where(x < 0, small, 1.0) / (1.0 + small)
