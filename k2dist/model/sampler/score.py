"""Logprobs of given tokens and of the likeliest, of the raw logits: temperature 1, before everything else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from k2dist.messages import TokenLogprob
from k2dist.model.sampler import order
from k2dist.model.sampler.mass import ONE, total_mass
from k2dist.model.sampler.vocabulary import VocabularySlice
from k2dist.model.transfer import Unread, indices, known
from k2dist.scheduler import MAX_LOGPROBS


def score(
    logits_Sv: Tensor, token_ids: Sequence[int], num_top: Sequence[int], vocabulary: VocabularySlice
) -> list[TokenLogprob]:
    """One per row: of `token_ids[i]`, and of the `num_top[i]` likeliest, likeliest first.

    Collective over the lane, two exchanges; the same bits on all its ranks and at any tp.
    """
    return launch_score(logits_Sv, indices(token_ids, logits_Sv.device), num_top, vocabulary).read()


def launch_score(
    logits_Sv: Tensor, token_S: Tensor, num_top: Sequence[int], vocabulary: VocabularySlice
) -> Unread[list[TokenLogprob]]:
    """`score`, not yet read; the tokens are on the device."""
    if not num_top:
        return known([])
    assert max(num_top) <= MAX_LOGPROBS, f"{max(num_top)}: at most {MAX_LOGPROBS}, checked at admission"
    largest_rS, logit_rS, key_rSC = vocabulary.gather(
        logits_Sv.amax(dim=1).double(),
        _logits_of(logits_Sv, token_S, vocabulary),
        order.highest_keys(logits_Sv, min(max(num_top), vocabulary.width), vocabulary.first),
    )
    largest_S = largest_rS.amax(dim=0)
    one_S1 = torch.ones(len(num_top), 1, dtype=torch.float64, device=logits_Sv.device)
    (mass_rS,) = vocabulary.gather(total_mass(logits_Sv, largest_S[:, None], one_S1))
    key_SC = key_rSC.transpose(0, 1).flatten(1).sort(dim=1, descending=True).values
    found = (token_S, mass_rS.sum(dim=0), key_SC, logit_rS.amax(dim=0), largest_S)
    return Unread(found, partial(_logprobs, num_top))


def _logprobs(num_top: Sequence[int], found: Sequence[Tensor]) -> list[TokenLogprob]:
    """Python's arithmetic on single numbers: no vector width can change it."""
    token_S, mass_S, key_SC, logit_S, largest_S = found
    log_total = [math.log(total / ONE) for total in mass_S.tolist()]
    top_id, top_logit = order.ids_of(key_SC).tolist(), order.logits_of(key_SC).double().tolist()
    logit, largest = logit_S.tolist(), largest_S.tolist()
    logprobs = []
    for row, (token_id, count) in enumerate(zip(token_S.tolist(), num_top, strict=True)):
        values = [value - largest[row] - log_total[row] for value in (logit[row], *top_logit[row][:count])]
        top = tuple(zip(top_id[row][:count], values[1:], strict=True))
        logprobs.append(TokenLogprob(token_id=token_id, logprob=values[0], top=top))
    return logprobs


def _logits_of(logits_Sv: Tensor, token_S: Tensor, vocabulary: VocabularySlice) -> Tensor:
    """Float64 [S]: each row's token's logit, -inf where it is another rank's."""
    column_S = token_S - vocabulary.first
    is_here_S = (column_S >= 0) & (column_S < vocabulary.width)
    logit_S1 = logits_Sv.gather(1, column_S.masked_fill(~is_here_S, 0)[:, None])
    return logit_S1[:, 0].double().masked_fill_(~is_here_S, -math.inf)
