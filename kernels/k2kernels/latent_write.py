"""Store each token's latent and rotated key part in the paged cache, in place.

C cache places (page * page_tokens + offset), T tokens (may be 0), L latent width, R rotary width, D = L + R.
`place_T`: int64, all different, 0 <= place < C. Values are rounded to the cache's dtype. Other places keep
their contents. Source: DeepSeek-V2 report, arXiv:2405.04434, section 2.1.2 (what MLA caches).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from k2kernels.cost import Cost


def reference_(cache_CD: Tensor, place_T: Tensor, latent_TL: Tensor, key_TR: Tensor) -> None:
    width = latent_TL.shape[1]
    cache_CD[place_T, :width] = latent_TL.to(cache_CD.dtype)
    cache_CD[place_T, width:] = key_TR.to(cache_CD.dtype)


@dataclass(frozen=True, slots=True)
class Case:
    T: int
    L: int = 512
    R: int = 64


CASES = [Case(T=t) for t in (0, 1, 64, 4096)]


def cost(case: Case) -> Cost:
    return Cost(case.T * ((case.L + case.R) * 4 + 8), 0)
