"""How to sample a row, and what comes of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from k2dist.messages import Sampling, TokenLogprob
from k2dist.model.transfer import indices, to_device


@dataclass(slots=True)
class SeenTokens:
    """What penalties count: the prompt's distinct tokens (int64, on the CPU) and the output's, by number."""

    prompt_C: Tensor
    counts: Counter[int] = field(default_factory=Counter)

    @classmethod
    def of(cls, prompt: Sequence[int], generated: Iterable[int]) -> SeenTokens:
        return cls(torch.tensor(prompt, dtype=torch.int64).unique(), Counter(generated))


@dataclass(frozen=True, slots=True)
class RowSampling:
    """How to sample one row. `position`: of the token to be sampled, counted from the prompt's first.

    num_generated: tokens of this output so far. `seen` is needed where `has_penalty(sampling)`.
    mask: the tokens that may come, one at least; None: all. uint8 on the CPU, a bit per id, lowest first.
    """

    sampling: Sampling
    output_index: int
    position: int
    num_generated: int = 0
    seen: SeenTokens | None = None
    mask: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Sampled:
    """In the order of the rows. A logprob is None where the request asked for none."""

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob | None, ...]


def has_penalty(sampling: Sampling) -> bool:
    return bool(sampling.repetition_penalty != 1.0 or sampling.presence_penalty or sampling.frequency_penalty)


def is_filtered(sampling: Sampling) -> bool:
    """Greedy rows never are: the likeliest token passes every filter."""
    filters = sampling.top_k > 0 or sampling.top_p < 1.0 or sampling.min_p > 0.0
    return filters and not is_greedy(sampling)


def is_greedy(sampling: Sampling) -> bool:
    return sampling.temperature == 0.0


def temperatures(rows: Sequence[RowSampling], device: torch.device) -> Tensor:
    """Float64 [N, 1], above 0. Colder than `_COLD` is the same: no noise bridges 1e-45 / 1e-200, and what is
    a float32 can still be divided by it."""
    values = [[max(row.sampling.temperature, _COLD)] for row in rows]
    return to_device(torch.tensor(values, dtype=torch.float64).view(-1, 1), device)


def take(x_ST: Tensor, rows: Sequence[int]) -> Tensor:
    """These rows, in ascending order; `x_ST` itself where they are all of them."""
    return x_ST if len(rows) == len(x_ST) else x_ST.index_select(0, indices(rows, x_ST.device))


_COLD = 1e-200
