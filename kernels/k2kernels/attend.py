"""Softmax attention over keys in tiles of fixed length: what `mla_decode` and `mla_prefill` share.

B batches, Q queries of one batch, n key tiles, J keys of a tile (64, the last tile filled up), D key width,
V value width. Tiles start at multiples of 64 from position 0, whatever is asked of them, so a query's bits do
not depend on how its prompt was cut or on how many keys its neighbours see: keys that it may not see weigh
exactly 0, and sums over tiles are not moved by zeros at their end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from k2kernels.rows import exp_of_negative, padded_rows, tree_sum

TILE_KEYS = 64


def num_tiles(num_keys: int) -> int:
    return -(-num_keys // TILE_KEYS)


def attend(q_BQD: Tensor, key_BnJD: Tensor, value_BnJV: Tensor, seen_BnQJ: Tensor, scale: float) -> Tensor:
    """softmax(q key^T * scale) value, float32 [B, Q, V].

    `seen_BnQJ`: bool, may be broadcast; every query sees at least one key. Keys and values must be finite
    where no query sees them too. Two passes: the largest score is known before the first exponential.
    """
    num_batches, num_queries, width = q_BQD.shape
    n, keys = key_BnJD.shape[1:3]
    q_NQD = q_BQD[:, None].expand(-1, n, -1, -1).reshape(num_batches * n, num_queries, width)
    score_NQJ = _scores(q_NQD, key_BnJD.flatten(0, 1)) * scale
    score_BnQJ = score_NQJ.view(num_batches, n, num_queries, keys).masked_fill(~seen_BnQJ, -torch.inf)
    share_BnQJ = exp_of_negative(score_BnQJ - score_BnQJ.amax(dim=(1, 3), keepdim=True))
    total_BQ = tree_sum(share_BnQJ.transpose(1, 2).flatten(2), -1)
    part_NQV = torch.bmm(share_BnQJ.flatten(0, 1), value_BnJV.flatten(0, 1))
    part_BnQV = part_NQV.view(num_batches, n, num_queries, value_BnJV.shape[-1])
    return tree_sum(part_BnQV, 1) / total_BQ[:, :, None]


def _scores(q_NQD: Tensor, key_NJD: Tensor) -> Tensor:
    """q key^T of each pair. Never of one pair alone: MKL would share its D among threads, and the bits of a
    short sequence would tell whether it had company.
    """
    num_pairs, at_least = len(q_NQD), max(len(q_NQD), 2)
    return torch.bmm(padded_rows(q_NQD, at_least), padded_rows(key_NJD, at_least).transpose(1, 2))[:num_pairs]


def read_pages(
    cache_CD: Tensor, page_RP: Tensor, page_tokens: int, length_R: Tensor, num_keys: int
) -> Tensor:
    """Keys 0 .. num_keys - 1 of R sequences in float32, [R, num_keys, D]; zeros from `length_R` on.

    C = pages * page_tokens places. `page_RP`: int64 page tables; entries past a sequence's length are not
    used, nor does anything that its pages hold there reach the result.
    """
    position_S = torch.arange(num_keys, device=cache_CD.device)
    is_key_RS = position_S < length_R[:, None]
    column_S = (position_S // page_tokens).clamp_max(page_RP.shape[1] - 1)
    place_RS = page_RP[:, column_S] * page_tokens + position_S % page_tokens
    key_RSD = cache_CD[place_RS.masked_fill(~is_key_RS, 0)].float()
    return key_RSD.masked_fill(~is_key_RS[:, :, None], 0.0)
