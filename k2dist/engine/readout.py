"""From the last hidden rows of a step to tokens and logprobs, in runs of rows whose logits fit in memory.

    hidden [S, D] ─ head, 64 MiB at a time ─> logits of this rank's slice [n, v] ─ sample | score

Rows that sample come first, then the prompt rows whose next token is to be scored.

Legend: S rows wanted, n rows of a run, D hidden width, v this rank's slice of the vocabulary V.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice

import torch
from torch import Tensor

from k2dist.errors import FaultyRankError
from k2dist.messages import TokenLogprob
from k2dist.model.sampler import RowSampling, Sampled, VocabularySlice, sample, score

# More: the head's weights (2.3 GB for K2 at tp 1) are read less often; the sampler needs twice as much again.
LOGIT_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class PromptScore:
    """One prompt token to be scored by the row before it, with its `num_top` likeliest rivals."""

    token_id: int
    num_top: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """In the order of what was wanted."""

    sampled: Sampled
    prompt_logprobs: tuple[tuple[TokenLogprob, ...], ...]

    @classmethod
    def nothing(cls) -> Outcome:
        return cls(Sampled((), ()), ())


@dataclass(frozen=True, slots=True)
class Readout:
    """`head`: hidden rows to float32 logits of `vocabulary`, this rank's columns."""

    head: Callable[[Tensor], Tensor]
    vocabulary: VocabularySlice
    end_token_ids: frozenset[int]
    logit_bytes: int = LOGIT_BYTES

    def read(
        self, x_SD: Tensor, rows: Sequence[RowSampling], scores: Sequence[Sequence[PromptScore]]
    ) -> Outcome:
        """A token of each of `rows`, which come first in `x_SD`; a logprob of each row after them.

        Collective over the lane; the same on all its ranks. FaultyRankError: logits that are not finite.
        """
        wanted = list(chain.from_iterable(scores))
        assert len(x_SD) == len(rows) + len(wanted), f"{len(x_SD)} rows, {len(rows)} and {len(wanted)} wanted"
        sampled = self._sample(x_SD[: len(rows)], rows)
        logprobs = iter(self._score(x_SD[len(rows) :], wanted))
        return Outcome(sampled, tuple(tuple(islice(logprobs, len(some))) for some in scores))

    def _sample(self, x_SD: Tensor, rows: Sequence[RowSampling]) -> Sampled:
        token_ids: list[int] = []
        logprobs: list[TokenLogprob | None] = []
        for some, logits_nv in self._runs(x_SD):
            sampled = sample(logits_nv, rows[some], self.vocabulary, end_token_ids=self.end_token_ids)
            token_ids += sampled.token_ids
            logprobs += sampled.logprobs
        return Sampled(tuple(token_ids), tuple(logprobs))

    def _score(self, x_SD: Tensor, wanted: Sequence[PromptScore]) -> list[TokenLogprob]:
        logprobs: list[TokenLogprob] = []
        for some, logits_nv in self._runs(x_SD):
            token_ids, num_top = zip(*((one.token_id, one.num_top) for one in wanted[some]), strict=True)
            logprobs += score(logits_nv, token_ids, num_top, self.vocabulary)
        return logprobs

    def _runs(self, x_SD: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """All rows in turn, each run with its logits. No row's bits depend on the cut."""
        num_rows = max(self.logit_bytes // (4 * self.vocabulary.width), 1)
        for first in range(0, len(x_SD), num_rows):
            some = slice(first, first + num_rows)
            logits_nv = self.head(x_SD[some])
            _check_finite(logits_nv)
            yield some, logits_nv


def _check_finite(logits_nv: Tensor) -> None:
    """FaultyRankError for NaN and infinities: noise would hide them in plausible tokens."""
    largest_n = torch.maximum(logits_nv.amax(dim=1), -logits_nv.amin(dim=1))  # NaN comes through
    bad = (~largest_n.isfinite()).nonzero()[:, 0].tolist()
    if bad:
        raise FaultyRankError(
            f"logits: {len(bad)} of {len(logits_nv)} rows hold NaN or infinity, row {bad[0]} first; weights, "
            f"cache or kernels of this rank are damaged: replace it"
        )
