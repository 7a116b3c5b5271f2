"""One token from each row of logits, and its logprobs.

    bias, penalties, end ids held back ── greedy: the largest
                                       └─ / temperature, top-k, top-p, min-p ── + noise: the largest

Adding Gumbel noise and taking the largest draws from the softmax (Maddison et al. 2014, arXiv:1411.0030,
section 2). The noise of a token is a function of (seed, output_index, position, token id) alone, so a token
depends on no batch, lane, preemption or restart, and tp ranks draw alike. Rows are sampled one by one: none
can change another's bits. Ties go to the lower token id everywhere.

Legend: S rows that sample, V vocabulary, C candidates left by the filters (ascending ids).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from k2dist.messages import Sampling, TokenLogprob
from k2dist.scheduler import MAX_LOGPROBS


@dataclass(frozen=True, slots=True)
class RowSampling:
    """How to sample one row. `position`: of the token to be sampled, counted from the prompt's first."""

    sampling: Sampling
    output_index: int
    position: int
    prompt: Sequence[int]
    generated: Sequence[int]  # so far, of this output


@dataclass(frozen=True, slots=True)
class Sampled:
    """In the order of the rows. A logprob is None where the request asked for none."""

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob | None, ...]


def sample(logits_SV: Tensor, rows: Sequence[RowSampling], *, end_token_ids: Collection[int] = ()) -> Sampled:
    """Choose a token per row. `logits_SV`: float32, unscaled, not changed.

    `end_token_ids` and a request's own stop ids are held back until `min_tokens` are out. Logprobs are of the
    raw logits: temperature 1, before bias, penalties and filters.
    """
    assert logits_SV.dtype == torch.float32, f"logits are float32, not {logits_SV.dtype}"
    assert len(logits_SV) == len(rows), f"{len(logits_SV)} rows of logits, {len(rows)} to sample"
    token_ids = tuple(
        _choose(logit_V, row, end_token_ids) for logit_V, row in zip(logits_SV, rows, strict=True)
    )
    logprobs = tuple(
        None if row.sampling.logprobs is None else _logprob(logit_V, token_id, row.sampling.logprobs)
        for logit_V, row, token_id in zip(logits_SV, rows, token_ids, strict=True)
    )
    return Sampled(token_ids, logprobs)


def _choose(logit_V: Tensor, row: RowSampling, end_token_ids: Collection[int]) -> int:
    logit_V = _adjust(logit_V, row, end_token_ids)
    if row.sampling.temperature == 0.0:
        return int(logit_V.argmax())  # the first of equals
    id_C, scaled_C = _filter(logit_V.double() / row.sampling.temperature, row.sampling)
    noisy_C = scaled_C + gumbel(id_C, row.sampling.seed, row.output_index, row.position)
    return int(id_C[noisy_C.argmax()])


# -- what a request adds to its logits -----------------------------------------------------------------------


def _adjust(logit_V: Tensor, row: RowSampling, end_token_ids: Collection[int]) -> Tensor:
    """Bias, then penalties, then the end tokens held back. A new tensor unless nothing changes."""
    sampling = row.sampling
    holds_back = len(row.generated) < sampling.min_tokens
    if not (sampling.logit_bias or _has_penalty(sampling) or holds_back):
        return logit_V
    logit_V = logit_V.clone()
    if sampling.logit_bias:
        logit_V[list(sampling.logit_bias)] += logit_V.new_tensor(list(sampling.logit_bias.values()))
    if _has_penalty(sampling):
        _penalise_(logit_V, row)
    if holds_back:
        logit_V[[*end_token_ids, *sampling.stop_token_ids]] = -math.inf
    return logit_V


def _has_penalty(sampling: Sampling) -> bool:
    return bool(sampling.repetition_penalty != 1.0 or sampling.presence_penalty or sampling.frequency_penalty)


def _penalise_(logit_V: Tensor, row: RowSampling) -> None:
    """Repetition, on tokens of prompt and output: a positive logit is divided by it, a negative one
    multiplied (after Keskar et al. 2019, arXiv:1909.05858, section 4.1). Then presence and frequency, on
    tokens of the output: subtracted once, and per occurrence (OpenAI's API reference).
    """
    sampling = row.sampling
    if sampling.repetition_penalty != 1.0:
        is_seen_V = _count_like(logit_V, [*row.prompt, *row.generated]) > 0
        factor = sampling.repetition_penalty
        penalised_V = torch.where(logit_V > 0, logit_V / factor, logit_V * factor)
        logit_V.copy_(torch.where(is_seen_V, penalised_V, logit_V))
    if sampling.presence_penalty or sampling.frequency_penalty:
        count_V = _count_like(logit_V, row.generated)
        logit_V -= sampling.presence_penalty * (count_V > 0) + sampling.frequency_penalty * count_V


def _count_like(logit_V: Tensor, token_ids: Sequence[int]) -> Tensor:
    """Int64 [V]: how often each token occurs."""
    id_C = torch.tensor(token_ids, dtype=torch.int64, device=logit_V.device)
    return id_C.bincount(minlength=len(logit_V))


# -- filters -------------------------------------------------------------------------------------------------


def _filter(scaled_V: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """The candidates, ascending, and their scaled logits: top-k, of those top-p, of those min-p.

    top_p: the fewest likeliest tokens whose probabilities reach it, one at least.
    min_p: a candidate's probability is at least this share of the likeliest's.
    """
    id_C = torch.arange(len(scaled_V), device=scaled_V.device)
    if 0 < sampling.top_k < len(scaled_V):
        id_C = _highest(scaled_V, sampling.top_k)
    if sampling.top_p < 1.0:
        id_C = id_C.sort().values
        id_C = id_C[scaled_V[id_C].argsort(descending=True, stable=True)]
        p_C = scaled_V[id_C].softmax(0)
        num_kept = int((p_C.cumsum(0) - p_C < sampling.top_p).sum())
        id_C = id_C[: max(num_kept, 1)]
    if sampling.min_p > 0.0:
        id_C = id_C[scaled_V[id_C] >= scaled_V[id_C].max() + math.log(sampling.min_p)]
    id_C = id_C.sort().values
    return id_C, scaled_V[id_C]


def _highest(value_V: Tensor, count: int) -> Tensor:
    """Ids of the `count` largest, largest first, equals by ascending id (which `topk` does not promise)."""
    least = value_V.topk(count).values[-1]
    id_C = (value_V >= least).nonzero()[:, 0]
    return id_C[value_V[id_C].argsort(descending=True, stable=True)][:count]


# -- noise ---------------------------------------------------------------------------------------------------


def gumbel(id_C: Tensor, seed: int, output_index: int, position: int) -> Tensor:
    """Float64 [C], standard Gumbel; each a function of its token id and the three counters."""
    return -torch.log(-torch.log(uniform(id_C, seed, output_index, position)))


def uniform(id_C: Tensor, seed: int, output_index: int, position: int) -> Tensor:
    """Float64 [C] in (0, 1), ends excluded: a hash of token id and counters, the same on every device.

    Output number `id` of a SplitMix64 generator (Steele et al. 2014, doi:10.1145/2660193.2660195) whose state
    is itself mixed from the counters, so that streams of neighbouring positions have nothing in common.
    """
    state = seed & _MASK
    for counter in (output_index, position):
        state = _mix(state + (counter + 1) * _GOLDEN)
    bits_C = _mix_tensor(_signed(state) + (id_C + 1) * _signed(_GOLDEN))
    # 52 bits and a half: with 53 the largest would round to 1, and its noise to infinity.
    return (_shift_right(bits_C, 12).double() + 0.5) * 2.0**-52


_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


def _mix(x: int) -> int:
    """SplitMix64's finaliser on a 64-bit integer."""
    x &= _MASK
    x = ((x ^ (x >> 30)) * _MIX_1) & _MASK
    x = ((x ^ (x >> 27)) * _MIX_2) & _MASK
    return x ^ (x >> 31)


def _mix_tensor(x_C: Tensor) -> Tensor:
    """`_mix`, elementwise on int64, whose products and sums wrap as unsigned ones do."""
    x_C = (x_C ^ _shift_right(x_C, 30)) * _signed(_MIX_1)
    x_C = (x_C ^ _shift_right(x_C, 27)) * _signed(_MIX_2)
    return x_C ^ _shift_right(x_C, 31)


def _shift_right(x_C: Tensor, num_bits: int) -> Tensor:
    """Logical shift: torch's own copies the sign."""
    return (x_C >> num_bits) & (_MASK >> num_bits)


def _signed(x: int) -> int:
    """The int64 with the same 64 bits."""
    return x - 2**64 if x >= 2**63 else x


# -- logprobs ------------------------------------------------------------------------------------------------


def _logprob(logit_V: Tensor, token_id: int, num_top: int) -> TokenLogprob:
    assert 0 <= num_top <= MAX_LOGPROBS, f"logprobs={num_top}: at most {MAX_LOGPROBS}, checked at admission"
    logprob_V = logit_V.double().log_softmax(0)
    top_C = (
        _highest(logprob_V, min(num_top, len(logprob_V))) if num_top else torch.empty(0, dtype=torch.int64)
    )
    top = tuple(zip(top_C.tolist(), logprob_V[top_C].tolist(), strict=True))
    return TokenLogprob(token_id=token_id, logprob=float(logprob_V[token_id]), top=top)
