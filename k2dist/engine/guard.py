"""NaN and infinity are found while serving, before they become plausible tokens.

Looked at are the last hidden rows of a step, which all tp ranks of a lane hold alike: they come to the same
judgement without asking each other. A bad row ends its request. Where no row is good, be it in one step or in
several, and more than one request has suffered, it is the rank that is at fault, not what it was asked.

S rows whose logits are wanted, D hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from k2dist.errors import FaultyRankError
from k2dist.ids import RequestId
from k2dist.model.transfer import Unread


class RowGuard:
    """One rank's guard over the rows of its lane."""

    def __init__(self) -> None:
        self._suspects: set[RequestId] = set()  # requests with bad rows since the last good row

    def check(
        self, x_SD: Tensor, owner_S: Sequence[RequestId]
    ) -> tuple[Tensor, Unread[dict[RequestId, str]]]:
        """Rows to go on with, the bad ones zero; and, to be read, what is wrong with each request that must
        end.

        `owner_S`: whose row each is. Reading raises FaultyRankError where the fault is this rank's own.
        """
        assert len(x_SD) == len(owner_S), f"{len(x_SD)} rows of {len(owner_S)} owners"
        is_bad_S = ~torch.isfinite(x_SD.float().sum(-1))  # of finite rows the sum is finite: they are normed
        judged = Unread((is_bad_S,), lambda values: self._judge(values[0].tolist(), x_SD, owner_S))
        return x_SD.masked_fill(is_bad_S[:, None], 0.0), judged

    def _judge(
        self, are_bad: Sequence[int], x_SD: Tensor, owner_S: Sequence[RequestId]
    ) -> dict[RequestId, str]:
        bad = [row for row, is_bad in enumerate(are_bad) if is_bad]
        if len(bad) < len(owner_S):
            self._suspects.clear()
        faults = {owner_S[row]: _fault(x_SD[row]) for row in bad}
        if bad and len(bad) == len(owner_S):
            self._suspects |= faults.keys()
        if bad and len(self._suspects) > 1:
            raise FaultyRankError(
                f"all {len(bad)} rows of a step are bad, and {len(self._suspects)} requests have seen no "
                f"others: {_fault(x_SD[bad[0]])}; try `k2dist verify`, and replace the rank"
            )
        return faults


def _fault(x_D: Tensor) -> str:
    num_nan, num_infinite = int(x_D.isnan().sum()), int(x_D.isinf().sum())
    return f"the last hidden state holds {num_nan} NaN and {num_infinite} infinities of {len(x_D)} values"
