"""Store each token's latent and rotated key part in the paged cache, in place.

C cache places (page * page_tokens + offset), T tokens (may be 0), L latent width, R rotary width, D = L + R.
`place_T`: int64, all different, 0 <= place < C. Values are rounded to the cache's dtype. Other places keep
their contents. Source: DeepSeek-V2 report, arXiv:2405.04434, section 2.1.2 (what MLA caches).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from k2kernels.arguments import FLOATS, INT64, check_tensor
from k2kernels.cost import Cost
from k2kernels.jit import OPTIONS, jit_varying, next_power_of_2
from k2kernels.portable import narrow

if TYPE_CHECKING:
    import triton.language as tl


def reference_(cache_CD: Tensor, place_T: Tensor, latent_TL: Tensor, key_TR: Tensor) -> None:
    width = latent_TL.shape[1]
    cache_CD[place_T, :width] = latent_TL.to(cache_CD.dtype)
    cache_CD[place_T, width:] = key_TR.to(cache_CD.dtype)


@jit_varying("place_ptr")
def _latent_write(
    cache_ptr,
    place_ptr,
    latent_ptr,
    key_ptr,
    L,
    R,
    cache_stride,
    latent_stride,
    key_stride,
    TILE_L: tl.constexpr,
    TILE_R: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    row = cache_ptr + tl.load(place_ptr + token) * cache_stride
    l_L, r_R = tl.arange(0, TILE_L), tl.arange(0, TILE_R)
    latent = tl.load(latent_ptr + token * latent_stride + l_L, mask=l_L < L, other=0.0).to(tl.float32)
    key = tl.load(key_ptr + token * key_stride + r_R, mask=r_R < R, other=0.0).to(tl.float32)
    tl.store(row + l_L, narrow(latent, cache_ptr.dtype.element_ty), mask=l_L < L)
    tl.store(row + L + r_R, narrow(key, cache_ptr.dtype.element_ty), mask=r_R < R)


def launch_(cache_CD: Tensor, place_T: Tensor, latent_TL: Tensor, key_TR: Tensor) -> None:
    """As `reference_`. Nobody looks whether a place is in the cache: that would wait for the device."""
    device = cache_CD.device
    check_tensor("latent_TL", latent_TL, (None, None), FLOATS, device)
    num_tokens, latent_width = latent_TL.shape
    check_tensor("key_TR", key_TR, (num_tokens, None), FLOATS, device)
    rotary = key_TR.shape[1]
    check_tensor("place_T", place_T, (num_tokens,), INT64, device)
    check_tensor("cache_CD", cache_CD, (None, latent_width + rotary), FLOATS, device)
    if num_tokens:
        _latent_write[num_tokens,](
            cache_CD,
            place_T,
            latent_TL,
            key_TR,
            latent_width,
            rotary,
            cache_CD.stride(0),
            latent_TL.stride(0),
            key_TR.stride(0),
            TILE_L=next_power_of_2(latent_width),
            TILE_R=next_power_of_2(rotary),
            num_warps=2,
            **OPTIONS,
        )


@dataclass(frozen=True, slots=True)
class Case:
    T: int
    L: int = 512
    R: int = 64


CASES = [Case(T=t) for t in (0, 1, 64, 4096)]


def cost(case: Case) -> Cost:
    return Cost(case.T * ((case.L + case.R) * 4 + 8), 0)
