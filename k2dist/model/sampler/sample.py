"""A token for each row, and its logprobs."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from k2dist.messages import TokenLogprob
from k2dist.model.sampler.adjust import adjusted
from k2dist.model.sampler.filters import choose_filtered
from k2dist.model.sampler.mass import MAX_VOCABULARY
from k2dist.model.sampler.plain import choose_plain
from k2dist.model.sampler.rows import RowSampling, Sampled, is_filtered, take
from k2dist.model.sampler.score import score
from k2dist.model.sampler.vocabulary import VocabularySlice


def sample(
    logits_Sv: Tensor,
    rows: Sequence[RowSampling],
    vocabulary: VocabularySlice,
    *,
    end_token_ids: Collection[int] = (),
) -> Sampled:
    """Choose a token per row. `logits_Sv`: float32, unscaled, finite, not changed; columns of `vocabulary`.

    Collective over the lane; the same result on all its ranks. `end_token_ids` and a request's own stop ids
    are held back until `min_tokens` are out. Logprobs are of the raw logits: see `score`.
    """
    assert logits_Sv.dtype == torch.float32, f"logits are float32, not {logits_Sv.dtype}"
    assert logits_Sv.shape == (len(rows), vocabulary.width), f"{len(rows)} rows, {tuple(logits_Sv.shape)}"
    assert vocabulary.vocab_size <= MAX_VOCABULARY, f"{vocabulary.vocab_size} tokens: sums would overflow"
    adjusted_Sv = adjusted(logits_Sv, rows, vocabulary, end_token_ids)
    token_ids = dict.fromkeys(range(len(rows)), -1)
    filtered = [index for index, row in enumerate(rows) if is_filtered(row.sampling)]
    plain = [index for index, row in enumerate(rows) if not is_filtered(row.sampling)]
    for group, choose in ((plain, choose_plain), (filtered, choose_filtered)):
        chosen = choose(take(adjusted_Sv, group), [rows[index] for index in group], vocabulary)
        token_ids |= zip(group, chosen, strict=True)
    return Sampled(tuple(token_ids.values()), _logprobs(logits_Sv, rows, token_ids, vocabulary))


def _logprobs(
    logits_Sv: Tensor, rows: Sequence[RowSampling], token_ids: dict[int, int], vocabulary: VocabularySlice
) -> tuple[TokenLogprob | None, ...]:
    """Of the rows that ask for them."""
    num_top = {i: row.sampling.logprobs for i, row in enumerate(rows) if row.sampling.logprobs is not None}
    asked = list(num_top)
    scored = score(take(logits_Sv, asked), [token_ids[i] for i in asked], list(num_top.values()), vocabulary)
    logprobs = dict(zip(asked, scored, strict=True))
    return tuple(logprobs.get(index) for index in range(len(rows)))
