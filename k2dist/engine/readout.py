"""From the last hidden rows of a step to tokens and logprobs, in runs of rows whose logits fit in memory.

    hidden [S, D] ─ head, 64 MiB at a time ─> logits of this rank's slice [n, v] ─ sample | score

Rows that sample come first, then the prompt rows whose next token is to be scored.

Legend: S rows wanted, n rows of a run, D hidden width, v this rank's slice of the vocabulary V.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import TypeVar

import torch
from torch import Tensor

from k2dist.errors import FaultyRankError
from k2dist.messages import TokenLogprob
from k2dist.model.sampler import RowSampling, Sampled, VocabularySlice, launch_sample, launch_score
from k2dist.model.transfer import Unread, all_of, both, indices

T = TypeVar("T")

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
        return self.launch(x_SD, rows, scores).read()

    def launch(
        self, x_SD: Tensor, rows: Sequence[RowSampling], scores: Sequence[Sequence[PromptScore]]
    ) -> Unread[Outcome]:
        """`read`, not yet read."""
        wanted = list(chain.from_iterable(scores))
        assert len(x_SD) == len(rows) + len(wanted), f"{len(x_SD)} rows, {len(rows)} and {len(wanted)} wanted"
        sampled = [
            _if_finite(
                logits_nv,
                launch_sample(logits_nv, rows[some], self.vocabulary, end_token_ids=self.end_token_ids),
            )
            for some, logits_nv in self._runs(x_SD[: len(rows)])
        ]
        scored = [
            _if_finite(logits_nv, self._score(logits_nv, wanted[some]))
            for some, logits_nv in self._runs(x_SD[len(rows) :])
        ]
        return both(all_of(sampled), all_of(scored)).map(partial(_outcome, scores))

    def _score(self, logits_nv: Tensor, wanted: Sequence[PromptScore]) -> Unread[list[TokenLogprob]]:
        token_n = indices([one.token_id for one in wanted], logits_nv.device)
        return launch_score(logits_nv, token_n, [one.num_top for one in wanted], self.vocabulary)

    def _runs(self, x_SD: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """All rows in turn, each run with its logits. No row's bits depend on the cut."""
        num_rows = max(self.logit_bytes // (4 * self.vocabulary.width), 1)
        for first in range(0, len(x_SD), num_rows):
            some = slice(first, first + num_rows)
            yield some, self.head(x_SD[some])


def _outcome(
    scores: Sequence[Sequence[PromptScore]], found: tuple[list[Sampled], list[list[TokenLogprob]]]
) -> Outcome:
    """Runs put together, and the logprobs in the lists that they were asked in."""
    runs, scored = found
    sampled = Sampled(
        tuple(chain.from_iterable(run.token_ids for run in runs)),
        tuple(chain.from_iterable(run.logprobs for run in runs)),
    )
    logprobs = chain.from_iterable(scored)
    return Outcome(sampled, tuple(tuple(islice(logprobs, len(some))) for some in scores))


def _if_finite(logits_nv: Tensor, unread: Unread[T]) -> Unread[T]:
    """Reading raises FaultyRankError for NaN and infinities: noise would hide them in plausible tokens."""
    largest_n = torch.maximum(logits_nv.amax(dim=1), -logits_nv.amin(dim=1))  # NaN comes through
    return both(Unread((~largest_n.isfinite(),), _check_finite), unread).map(lambda found: found[1])


def _check_finite(values: Sequence[Tensor]) -> None:
    bad = [row for row, is_bad in enumerate(values[0].tolist()) if is_bad]
    if bad:
        raise FaultyRankError(
            f"logits: {len(bad)} of {len(values[0])} rows hold NaN or infinity, row {bad[0]} first; weights, "
            f"cache or kernels of this rank are damaged: replace it"
        )
