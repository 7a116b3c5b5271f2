"""A token for each row, and its logprobs."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from k2dist.messages import TokenLogprob
from k2dist.model.sampler.adjust import adjusted
from k2dist.model.sampler.filters import FEW, GROWTH, choose_filtered, try_filtered
from k2dist.model.sampler.mass import MAX_VOCABULARY
from k2dist.model.sampler.plain import choose_plain
from k2dist.model.sampler.rows import RowSampling, Sampled, is_filtered, take
from k2dist.model.sampler.score import launch_score, score
from k2dist.model.sampler.vocabulary import VocabularySlice
from k2dist.model.transfer import Unread, both, indices


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
    return launch_sample(logits_Sv, rows, vocabulary, end_token_ids=end_token_ids).read()


def launch_sample(
    logits_Sv: Tensor,
    rows: Sequence[RowSampling],
    vocabulary: VocabularySlice,
    *,
    end_token_ids: Collection[int] = (),
) -> Unread[Sampled]:
    """`sample`, not yet read; `logits_Sv` is kept until it is.

    Rows whose filters need more candidates than were looked at are chosen anew once that is known.
    """
    assert logits_Sv.dtype == torch.float32, f"logits are float32, not {logits_Sv.dtype}"
    assert logits_Sv.shape == (len(rows), vocabulary.width), f"{len(rows)} rows, {tuple(logits_Sv.shape)}"
    assert vocabulary.vocab_size <= MAX_VOCABULARY, f"{vocabulary.vocab_size} tokens: sums would overflow"
    adjusted_Sv = adjusted(logits_Sv, rows, vocabulary, end_token_ids)
    token_S, is_sure_S = _first_choice(adjusted_Sv, rows, vocabulary)
    num_top = {i: row.sampling.logprobs for i, row in enumerate(rows) if row.sampling.logprobs is not None}
    asked = list(num_top)
    scored = launch_score(take(logits_Sv, asked), take(token_S, asked), list(num_top.values()), vocabulary)

    def then(found: tuple[tuple[list[int], list[bool]], list[TokenLogprob]]) -> Sampled:
        (token_ids, are_unsure), first_logprobs = found
        logprobs = dict(zip(asked, first_logprobs, strict=True))
        unsure = [index for index, is_unsure in enumerate(are_unsure) if is_unsure]
        if unsure:
            some = [rows[index] for index in unsure]
            again = choose_filtered(take(adjusted_Sv, unsure), some, vocabulary, few=FEW * GROWTH)
            for index, token_id in zip(unsure, again, strict=True):
                token_ids[index] = token_id
            logprobs |= _logprobs_again(logits_Sv, token_ids, num_top, unsure, vocabulary)
        return Sampled(tuple(token_ids), tuple(logprobs.get(index) for index in range(len(rows))))

    return both(_choice(token_S, is_sure_S), scored).map(then)


def _first_choice(
    adjusted_Sv: Tensor, rows: Sequence[RowSampling], vocabulary: VocabularySlice
) -> tuple[Tensor, Tensor]:
    """A token per row, and whether it is sure: int64 and bool [S], on the device."""
    device = adjusted_Sv.device
    token_S = torch.zeros(len(rows), dtype=torch.int64, device=device)
    is_sure_S = torch.ones(len(rows), dtype=torch.bool, device=device)
    filtered = [index for index, row in enumerate(rows) if is_filtered(row.sampling)]
    plain = [index for index, row in enumerate(rows) if not is_filtered(row.sampling)]
    if plain:
        some = [rows[index] for index in plain]
        token_S.index_copy_(
            0, indices(plain, device), choose_plain(take(adjusted_Sv, plain), some, vocabulary)
        )
    if filtered:
        some, row_N = [rows[index] for index in filtered], indices(filtered, device)
        token_N, is_sure_N = try_filtered(take(adjusted_Sv, filtered), some, vocabulary)
        token_S.index_copy_(0, row_N, token_N)
        is_sure_S.index_copy_(0, row_N, is_sure_N)
    return token_S, is_sure_S


def _choice(token_S: Tensor, is_sure_S: Tensor) -> Unread[tuple[list[int], list[bool]]]:
    """The tokens, and which of them are not sure."""
    return Unread((token_S, ~is_sure_S), lambda values: (values[0].tolist(), values[1].bool().tolist()))


def _logprobs_again(
    logits_Sv: Tensor,
    token_ids: Sequence[int],
    num_top: dict[int, int],
    unsure: Sequence[int],
    vocabulary: VocabularySlice,
) -> dict[int, TokenLogprob]:
    """Of those among `unsure` that ask for them."""
    asked = [index for index in unsure if index in num_top]
    if not asked:
        return {}
    scored = score(
        take(logits_Sv, asked),
        [token_ids[index] for index in asked],
        [num_top[index] for index in asked],
        vocabulary,
    )
    return dict(zip(asked, scored, strict=True))
