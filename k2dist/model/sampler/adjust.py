"""What a request does to its logits: bias, penalties, end ids held back, and last what a grammar forbids.

Only the tokens named by a request are touched. Each step is computed in float64 and rounded to float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from k2dist.messages import Sampling
from k2dist.model.sampler.rows import RowSampling, SeenTokens, has_penalty
from k2dist.model.sampler.vocabulary import VocabularySlice
from k2dist.model.transfer import indices, to_device


def adjusted(
    logits_Sv: Tensor,
    rows: Sequence[RowSampling],
    vocabulary: VocabularySlice,
    end_token_ids: Collection[int],
) -> Tensor:
    """Float32 [S, v]: a new tensor, or `logits_Sv` itself where no row changes anything."""
    edits = _Edits(logits_Sv, vocabulary)
    for index, row in enumerate(rows):
        edits.bias(index, row.sampling)
        if has_penalty(row.sampling):
            assert row.seen is not None, f"row {index} has penalties and no seen tokens"
            edits.penalise(index, row.sampling, row.seen)
        if row.num_generated < row.sampling.min_tokens:
            edits.hold_back(index, [*end_token_ids, *row.sampling.stop_token_ids])
    return _masked(edits.apply(), logits_Sv, rows, vocabulary)


def _masked(
    adjusted_Sv: Tensor, logits_Sv: Tensor, rows: Sequence[RowSampling], vocabulary: VocabularySlice
) -> Tensor:
    """-inf where a mask has no bit. `logits_Sv` itself is not changed.

    A bit per token travels to the device, an eighth of a byte per token, and is spread out there.
    """
    masked = [index for index, row in enumerate(rows) if row.mask is not None]
    if not masked:
        return adjusted_Sv
    first, stop = vocabulary.first, vocabulary.first + vocabulary.width
    bits_NB = torch.stack([row.mask[first // 8 : -(-stop // 8)] for row in rows if row.mask is not None])
    device = logits_Sv.device
    bits_NB8 = to_device(bits_NB, device)[:, :, None] & to_device(_BITS, device)
    is_allowed_Nv = bits_NB8.bool().flatten(1)[:, first % 8 : first % 8 + vocabulary.width]
    if adjusted_Sv is logits_Sv:
        adjusted_Sv = logits_Sv.clone()
    row_N = indices(masked, device)
    masked_Nv = adjusted_Sv.index_select(0, row_N).masked_fill_(~is_allowed_Nv, -math.inf)
    return adjusted_Sv.index_copy_(0, row_N, masked_Nv)


_BITS = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)


class _Edits:
    """Changes to single logits, gathered row by row and applied kind by kind."""

    def __init__(self, logits_Sv: Tensor, vocabulary: VocabularySlice) -> None:
        self._logits_Sv = logits_Sv
        self._vocabulary = vocabulary
        self._biased = _Places()
        self._repeated = _Places()
        self._counted = _Places()
        self._held_back = _Places()

    def bias(self, row: int, sampling: Sampling) -> None:
        if sampling.logit_bias:
            self._biased.add(row, _ints(sampling.logit_bias), _floats(sampling.logit_bias.values()))

    def penalise(self, row: int, sampling: Sampling, seen: SeenTokens) -> None:
        """Repetition counts tokens of prompt and output; presence and frequency those of the output."""
        output_C = _ints(seen.counts)
        if sampling.repetition_penalty != 1.0:
            id_C = torch.cat([seen.prompt_C, output_C]).unique()
            self._repeated.add(
                row, id_C, torch.full(id_C.shape, sampling.repetition_penalty, dtype=torch.float64)
            )
        if sampling.presence_penalty or sampling.frequency_penalty:
            count_C = _floats(seen.counts.values())
            self._counted.add(row, output_C, sampling.presence_penalty + sampling.frequency_penalty * count_C)

    def hold_back(self, row: int, token_ids: list[int]) -> None:
        id_C = _ints(token_ids)
        self._held_back.add(row, id_C, torch.zeros(id_C.shape, dtype=torch.float64))

    def apply(self) -> Tensor:
        steps: list[tuple[_Places, Callable[[Tensor, Tensor], Tensor]]] = [
            (self._biased, torch.add),
            (self._repeated, _repeat),
            (self._counted, torch.sub),
            (self._held_back, lambda logit_C, _: torch.full_like(logit_C, -math.inf)),
        ]
        logits_Sv = self._logits_Sv
        for places, change in steps:
            if places:
                if logits_Sv is self._logits_Sv:
                    logits_Sv = logits_Sv.clone()
                places.change_(logits_Sv, self._vocabulary, change)
        return logits_Sv


class _Places:
    """Logits of some tokens of some rows, with a float64 value for each; no place twice that matters."""

    def __init__(self) -> None:
        self._row: list[Tensor] = []
        self._id: list[Tensor] = []
        self._value: list[Tensor] = []

    def __bool__(self) -> bool:
        return bool(self._row)

    def add(self, row: int, id_C: Tensor, value_C: Tensor) -> None:
        self._row.append(torch.full_like(id_C, row))
        self._id.append(id_C)
        self._value.append(value_C)

    def change_(
        self, logits_Sv: Tensor, vocabulary: VocabularySlice, change: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        """logit = change(logit, value) at the places that lie in this rank's columns."""
        row_C, value_C = torch.cat(self._row), torch.cat(self._value)
        column_C = torch.cat(self._id) - vocabulary.first
        is_here_C = (column_C >= 0) & (column_C < vocabulary.width)
        device = logits_Sv.device
        place = (to_device(row_C[is_here_C], device), to_device(column_C[is_here_C], device))
        logits_Sv[place] = change(logits_Sv[place].double(), to_device(value_C[is_here_C], device)).float()


def _repeat(logit_C: Tensor, penalty_C: Tensor) -> Tensor:
    """A positive logit is divided by it, a negative one multiplied (after Keskar et al. 2019,
    arXiv:1909.05858, section 4.1)."""
    return torch.where(logit_C > 0, logit_C / penalty_C, logit_C * penalty_C)


def _ints(values: Collection[int]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int64)


def _floats(values: Collection[float]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.float64)
