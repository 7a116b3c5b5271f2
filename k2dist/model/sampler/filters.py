"""Rows with top-k, top-p or min-p: who is left is decided on a few candidates, wherever these suffice.

Each filter keeps a first part of the row in order: the k highest; of those the fewest whose probabilities
reach top_p, one at least; of those the ones whose probability is at least min_p times the likeliest's.

    rank 0   9.1  7.7 | 3.0  ...        its 2 highest are sent; nothing else of it is above 7.7
    rank 1   8.2  4.5 | 4.4  ...
    merged   9.1  8.2  7.7 ? 4.5        certain down to 7.7: another of rank 0's may come next

A row whose border is not among the certain ones is tried again with more candidates, in the end with all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from k2dist.model.sampler import order
from k2dist.model.sampler.mass import mass, total_mass
from k2dist.model.sampler.noise import gumbel, states
from k2dist.model.sampler.rows import RowSampling, take, temperatures
from k2dist.model.sampler.vocabulary import VocabularySlice
from k2dist.model.transfer import indices, to_device

FEW = (
    256  # candidates per rank at first: torch's top 256 of 163,840 take a third of the time of its top 1,024
)
GROWTH = 16


def try_filtered(
    logits_Nv: Tensor, rows: Sequence[RowSampling], vocabulary: VocabularySlice, count: int = FEW
) -> tuple[Tensor, Tensor]:
    """A token per row, and whether it is sure: int64 and bool [N], on the device.

    `count`: candidates of each rank; with all columns every token is sure. Collective over the lane.
    """
    candidates = _Candidates.find(logits_Nv, list(rows), vocabulary, count)
    num_kept_N, is_sure_N = candidates.border(candidates.total_mass(logits_Nv))
    return candidates.draw(num_kept_N), is_sure_N


def choose_filtered(
    logits_Nv: Tensor, rows: Sequence[RowSampling], vocabulary: VocabularySlice, *, few: int = FEW
) -> list[int]:
    """A token per row, once all are sure. Collective over the lane; equal on its ranks, whatever `few`."""
    token_ids: dict[int, int] = {}
    for count in (few, few * GROWTH, vocabulary.width):
        left = [index for index in range(len(rows)) if index not in token_ids]
        if not left:
            break
        token_N, is_sure_N = try_filtered(
            take(logits_Nv, left), [rows[index] for index in left], vocabulary, count
        )
        chosen = zip(left, token_N.tolist(), is_sure_N.tolist(), strict=True)
        token_ids |= {index: token_id for index, token_id, is_sure in chosen if is_sure}
    return [token_ids[index] for index in range(len(rows))]


@dataclass(frozen=True, slots=True)
class _Candidates:
    """The highest tokens of each row, best first. The first `num_certain_N` are the row's highest indeed."""

    rows: list[RowSampling]
    vocabulary: VocabularySlice
    id_NC: Tensor
    logit_NC: Tensor  # float64
    num_certain_N: Tensor

    @classmethod
    def find(
        cls, logits_Nv: Tensor, rows: list[RowSampling], vocabulary: VocabularySlice, count: int
    ) -> _Candidates:
        """Every rank sends `count` per row, or all that it has."""
        count = min(count, vocabulary.width)
        (key_rNC,) = vocabulary.gather(order.highest_keys(logits_Nv, count, vocabulary.first))
        key_NC = key_rNC.transpose(0, 1).flatten(1).sort(dim=1, descending=True).values
        last_rN = key_rNC[:, :, -1]
        last_N = last_rN.amin(dim=0) if count == vocabulary.width else last_rN.amax(dim=0)
        num_certain_N = (key_NC >= last_N[:, None]).sum(dim=1)
        logit_NC = order.logits_of(key_NC).double()
        return cls(rows, vocabulary, order.ids_of(key_NC), logit_NC, num_certain_N)

    def total_mass(self, logits_Nv: Tensor) -> Tensor:
        """Int64 [N]: of the whole vocabulary where top-p is a share of that, else 0. Collective if any is."""
        total_N = torch.zeros_like(self.num_certain_N)
        need = [i for i, row in enumerate(self.rows) if row.sampling.top_p < 1.0 and not self._has_top_k(row)]
        if need:
            largest_N1, temperature_N1 = take(self.logit_NC[:, :1], need), take(self._temperatures(), need)
            part_N = total_mass(take(logits_Nv, need), largest_N1, temperature_N1)
            sum_N = self.vocabulary.gather(part_N)[0].sum(dim=0)
            total_N.index_copy_(0, indices(need, total_N.device), sum_N)
        return total_N

    def border(self, total_N: Tensor) -> tuple[Tensor, Tensor]:
        """How many of each row the filters keep, and whether that is sure: int64 and bool [N]."""
        distance_NC = (self.logit_NC - self.logit_NC[:, :1]) / self._temperatures()
        top_k_N, top_p_N = self._top_ks(), self._column([row.sampling.top_p for row in self.rows])[:, 0]
        least = [math.log(row.sampling.min_p) if row.sampling.min_p > 0.0 else -math.inf for row in self.rows]
        num_kept_N = (distance_NC >= self._column(least)).sum(dim=1).minimum(top_k_N)
        has_top_p_N = top_p_N < 1.0
        if any(row.sampling.top_p < 1.0 for row in self.rows):
            nucleus_N = _nucleus(mass(distance_NC), top_k_N, top_p_N, total_N)
            num_kept_N = torch.where(has_top_p_N, num_kept_N.minimum(nucleus_N), num_kept_N)
        num_kept_N = num_kept_N.clamp(min=1)
        # A share of the k highest is known only if these are; a border only if it has something behind it.
        is_top_k_N = top_k_N <= self.num_certain_N
        is_share_N = ~has_top_p_N | is_top_k_N | (top_k_N == self.vocabulary.vocab_size)
        has_border_N = (num_kept_N < self.num_certain_N) | (is_top_k_N & (num_kept_N == top_k_N))
        return num_kept_N, is_share_N & has_border_N

    def draw(self, num_kept_N: Tensor) -> Tensor:
        """Of each row's first `num_kept_N` the one that is highest with its noise: int64 [N]."""
        id_NC, device = self.id_NC, self.id_NC.device
        noisy_NC = self.logit_NC / self._temperatures() + gumbel(id_NC, states(self.rows, device))
        noisy_NC.masked_fill_(torch.arange(id_NC.shape[1], device=device) >= num_kept_N[:, None], -math.inf)
        is_best_NC = noisy_NC == noisy_NC.amax(dim=1, keepdim=True)
        return id_NC.masked_fill(~is_best_NC, self.vocabulary.vocab_size).amin(dim=1)

    def _top_ks(self) -> Tensor:
        """Int64 [N]: the vocabulary where there is none."""
        vocab_size = self.vocabulary.vocab_size
        values = [row.sampling.top_k if self._has_top_k(row) else vocab_size for row in self.rows]
        return indices(values, self.id_NC.device)

    def _has_top_k(self, row: RowSampling) -> bool:
        return 0 < row.sampling.top_k < self.vocabulary.vocab_size

    def _temperatures(self) -> Tensor:
        """Float64 [N, 1]."""
        return temperatures(self.rows, self.id_NC.device)

    def _column(self, values: list[float]) -> Tensor:
        """Float64 [N, 1]."""
        return to_device(torch.tensor(values, dtype=torch.float64)[:, None], self.id_NC.device)


def _nucleus(mass_NC: Tensor, top_k_N: Tensor, top_p_N: Tensor, total_N: Tensor) -> Tensor:
    """Int64 [N]: how many candidates reach top_p of `total_N` (0: of the k highest), or all if none do."""
    is_below_k_NC = torch.arange(mass_NC.shape[1], device=mass_NC.device) < top_k_N[:, None]
    total_N = torch.where(total_N > 0, total_N, (mass_NC * is_below_k_NC).sum(dim=1))
    before_NC = mass_NC.cumsum(dim=1) - mass_NC
    return (before_NC.double() < (top_p_N * total_N.double())[:, None]).sum(dim=1)
