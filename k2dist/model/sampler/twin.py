"""What sampling means: whole rows, one by one, in plain steps. The slow twin of `sample` and `score`.

It shares with them the noise and the unit of probability, and nothing else. Tests compare every bit.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from itertools import accumulate

from torch import Tensor

from k2dist.messages import Sampling, TokenLogprob
from k2dist.model.sampler.mass import ONE, mass
from k2dist.model.sampler.noise import gumbel, states
from k2dist.model.sampler.rows import RowSampling, Sampled


def sample_whole(
    logits_SV: Tensor, rows: Sequence[RowSampling], *, end_token_ids: Collection[int] = ()
) -> Sampled:
    """`sample` of the whole vocabulary, on one rank."""
    token_ids, logprobs = [], []
    for logit_V, row in zip(logits_SV, rows, strict=True):
        token_ids.append(_choose(_adjust(logit_V, row, end_token_ids), row))
        num_top = row.sampling.logprobs
        logprobs.append(None if num_top is None else score_whole(logit_V, token_ids[-1], num_top))
    return Sampled(tuple(token_ids), tuple(logprobs))


def score_whole(logit_V: Tensor, token_id: int, num_top: int) -> TokenLogprob:
    """`score` of one whole row."""
    largest = float(logit_V.max())
    log_total = math.log(int(mass(logit_V.double() - largest).sum()) / ONE)

    def logprob(i: int) -> float:
        return float(logit_V[i]) - largest - log_total

    top = tuple((i, logprob(i)) for i in _in_order(logit_V)[:num_top].tolist())
    return TokenLogprob(token_id=token_id, logprob=logprob(token_id), top=top)


def _choose(logit_V: Tensor, row: RowSampling) -> int:
    sampling = row.sampling
    id_C = _in_order(logit_V)
    if sampling.temperature == 0.0:
        return int(id_C[0])
    id_C = _keep(logit_V, id_C, sampling).sort().values
    noise_C = gumbel(id_C, states([row], logit_V.device))[0]
    return int(
        id_C[(logit_V[id_C].double() / sampling.temperature + noise_C).argmax()]
    )  # the first of equals


def _keep(logit_V: Tensor, id_C: Tensor, sampling: Sampling) -> Tensor:
    """Top-k, of those top-p, of those min-p; likeliest first, as `id_C` is."""
    if sampling.top_k > 0:
        id_C = id_C[: sampling.top_k]
    distance_C = (logit_V[id_C].double() - logit_V[id_C[0]].double()) / sampling.temperature
    num_kept = len(id_C)
    if sampling.top_p < 1.0:
        sums = list(accumulate(mass(distance_C).tolist()))
        num_kept = 1 + sum(float(before) < sampling.top_p * float(sums[-1]) for before in sums[:-1])
    if sampling.min_p > 0.0:
        num_kept = min(num_kept, int((distance_C >= math.log(sampling.min_p)).sum()))
    return id_C[:num_kept]


def _in_order(logit_V: Tensor) -> Tensor:
    """All ids, likeliest first, of equals the lower first."""
    return logit_V.argsort(descending=True, stable=True)


def _adjust(logit_V: Tensor, row: RowSampling, end_token_ids: Collection[int]) -> Tensor:
    """Bias; repetition, over prompt and output; presence once and frequency per occurrence, over the output
    (OpenAI's API reference); end ids held back; what the mask lacks. Python's floats, rounded to float32
    after each.
    """
    sampling, logit_V = row.sampling, logit_V.clone()
    for i, bias in sampling.logit_bias.items():
        logit_V[i] = float(logit_V[i]) + bias
    prompt, counts = (
        ((), Counter[int]()) if row.seen is None else (row.seen.prompt_C.tolist(), row.seen.counts)
    )
    factor = sampling.repetition_penalty
    for i in {*prompt, *counts}:
        logit_V[i] = float(logit_V[i]) / factor if logit_V[i] > 0 else float(logit_V[i]) * factor
    for i, count in counts.items():
        logit_V[i] = float(logit_V[i]) - (sampling.presence_penalty + sampling.frequency_penalty * count)
    if row.num_generated < sampling.min_tokens:
        logit_V[[*end_token_ids, *sampling.stop_token_ids]] = -math.inf
    if row.mask is not None:
        allowed = [i for i in range(len(logit_V)) if int(row.mask[i // 8]) >> (i % 8) & 1]
        forbidden = sorted({*range(len(logit_V))} - {*allowed})
        logit_V[forbidden] = -math.inf
    return logit_V
