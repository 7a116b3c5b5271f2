"""A step's rows in two halves, which are computed side by side.

The first half is always a layer ahead, so the second may hold the rest of a prompt that the first begins:
what it reads of the cache has been written. A row's bits depend on it alone, so no cut changes any.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from k2dist.engine.shares import even_shares
from k2dist.model.batch import Batch, PromptSegment


def halves(batch: Batch) -> tuple[tuple[Batch, Batch], Tensor]:
    """`batch`, on the CPU, cut after half of its rows; and where among the samples of the first and then the
    second half each of its samples is: int64 [S]."""
    cut = (batch.num_rows + 1) // 2
    is_first_S = batch.sample_S < cut
    order_S = torch.cat([is_first_S.nonzero()[:, 0], (~is_first_S).nonzero()[:, 0]])
    return (_rows(batch, 0, cut), _rows(batch, cut, batch.num_rows)), order_S.argsort()


def _rows(batch: Batch, begin: int, end: int) -> Batch:
    """Rows [begin, end)."""
    is_decode_R = (batch.decode_row_R >= begin) & (batch.decode_row_R < end)
    is_sample_S = (batch.sample_S >= begin) & (batch.sample_S < end)
    prompts = (_segment(prompt, begin, end) for prompt in batch.prompts)
    return Batch(
        token_T=batch.token_T[begin:end],
        position_T=batch.position_T[begin:end],
        write_T=batch.write_T[begin:end],
        shares=even_shares(end - begin, len(batch.shares)),
        prompts=tuple(prompt for prompt in prompts if prompt is not None),
        decode_row_R=batch.decode_row_R[is_decode_R] - begin,
        decode_length_R=batch.decode_length_R[is_decode_R],
        decode_page_RP=batch.decode_page_RP[is_decode_R],
        sample_S=batch.sample_S[is_sample_S] - begin,
    )


def _segment(prompt: PromptSegment, begin: int, end: int) -> PromptSegment | None:
    """Its part in rows [begin, end), counted from there."""
    first, last = max(prompt.row, begin), min(prompt.row + prompt.num_rows, end)
    if first >= last:
        return None
    start = prompt.start + first - prompt.row
    return replace(prompt, row=first - begin, num_rows=last - first, start=start)
