"""Rows without filters: the highest token, of the logits (greedy) or of logits / temperature + noise.

Each rank finds its best; the best of these is the row's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from k2dist.model.sampler.mass import tiles
from k2dist.model.sampler.noise import NUM_BITS, bits, gumbel_of, states
from k2dist.model.sampler.rows import RowSampling, is_greedy, take, temperatures
from k2dist.model.sampler.vocabulary import VocabularySlice
from k2dist.model.transfer import indices


def choose_plain(logits_Nv: Tensor, rows: Sequence[RowSampling], vocabulary: VocabularySlice) -> Tensor:
    """A token per row, int64 [N] on the device. Collective over the lane, one exchange."""
    device = logits_Nv.device
    value_N = torch.empty(len(rows), dtype=torch.float64, device=device)
    id_N = torch.empty(len(rows), dtype=torch.int64, device=device)
    if not rows:
        return id_N
    greedy = [index for index, row in enumerate(rows) if is_greedy(row.sampling)]
    noisy = [index for index, row in enumerate(rows) if not is_greedy(row.sampling)]
    if greedy:
        best = take(logits_Nv, greedy).max(dim=1)  # the first of equals
        value_N.index_copy_(0, indices(greedy, device), best.values.double())
        id_N.index_copy_(0, indices(greedy, device), best.indices + vocabulary.first)
    if noisy:
        best_N, best_id_N = _noisiest(take(logits_Nv, noisy), [rows[index] for index in noisy], vocabulary)
        value_N.index_copy_(0, indices(noisy, device), best_N)
        id_N.index_copy_(0, indices(noisy, device), best_id_N)
    value_rN, id_rN = vocabulary.gather(value_N, id_N)
    rank_1N = value_rN.argmax(dim=0, keepdim=True)  # the first of equals: it has the lower ids
    return id_rN.gather(0, rank_1N)[0]


def _noisiest(
    logits_Nv: Tensor, rows: list[RowSampling], vocabulary: VocabularySlice
) -> tuple[Tensor, Tensor]:
    """The best of this rank's columns and their token ids: float64 and int64 [N]."""
    device = logits_Nv.device
    id_v, state_N1 = vocabulary.ids(device), states(rows, device)
    temperature_N1 = temperatures(rows, device)
    found = [
        _noisiest_of(bits(id_v, state_N1[some]), logits_Nv[some].double().div_(temperature_N1[some]))
        for some in tiles(logits_Nv)
    ]
    value_N, column_N = (torch.cat(parts) for parts in zip(*found, strict=True))
    return value_N, column_N + vocabulary.first


def _noisiest_of(bits_nv: Tensor, scaled_nv: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of scaled + noise in each row, and its column: float64 and int64 [n]."""
    # How many rivals there are another device would have to be asked, and it has logarithms to spare.
    of = noisiest_of_rivals if scaled_nv.device.type == "cpu" else noisiest_of_all
    return of(bits_nv, scaled_nv)


def noisiest_of_all(bits_nv: Tensor, scaled_nv: Tensor) -> tuple[Tensor, Tensor]:
    best = (scaled_nv + gumbel_of(bits_nv)).max(dim=1)  # the first of equals
    return best.values, best.indices


def noisiest_of_rivals(bits_nv: Tensor, scaled_nv: Tensor) -> tuple[Tensor, Tensor]:
    """Only for tokens that may win is the noise worth its two logarithms: for the few with noise above
    `_CALM`, and for those that without it come within `_CALM` of what the likeliest token has with its own.
    """
    likeliest = scaled_nv.max(dim=1, keepdim=True)
    reached_n1 = likeliest.values + gumbel_of(bits_nv.gather(1, likeliest.indices))
    rounding_n1 = likeliest.values.abs().mul_(1e-15).add_(1e-6)  # more than sums and logarithms lose
    is_rival_nv = (bits_nv > _CALM_BITS) | (scaled_nv >= reached_n1 - (_CALM + rounding_n1))
    row_C, column_C = is_rival_nv.nonzero(as_tuple=True)
    noisy_C = scaled_nv[row_C, column_C] + gumbel_of(bits_nv[row_C, column_C])
    best_n = reached_n1[:, 0].scatter_reduce(0, row_C, noisy_C, "amax")
    is_best_C = noisy_C == best_n[row_C]
    column_n = likeliest.indices.new_full(best_n.shape, scaled_nv.shape[1])
    return best_n, column_n.scatter_reduce(0, row_C[is_best_C], column_C[is_best_C], "amin")


_CALM = 4.0  # 1.8% of all noise is above; less: more tokens have noise above it, more: more come near without
_CALM_BITS = math.floor(math.exp(-math.exp(-_CALM)) * 2.0**NUM_BITS)
