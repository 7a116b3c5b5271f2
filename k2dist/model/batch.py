"""The rows of one lane's step: the same on all tp ranks of the lane.

T rows (0: an idle lane), R of them decode rows, P pages of the longest table among these, S rows that sample.

    row      0   1   2   3   4   5   6        shares (4, 3): tp rank 0 keeps the residual stream of rows 0-3
             └── prompt ──┘   │   └─ prompt ┘
                            decode            each row belongs to one prompt segment or is one decode row
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from k2dist.model.transfer import to_device


@dataclass(frozen=True, slots=True)
class PromptSegment:
    """Rows [row, row + num_rows): prompt positions [start, start + num_rows) of one sequence.

    Everything before `start` is in the cache. `page_table`: int64, covers start + num_rows tokens at least.
    """

    row: int
    num_rows: int
    start: int
    page_table: Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """See the module. All tensors int64, on the device of the rank's weights, whether there are rows or not.

    A decode row's table may be longer than its sequence needs.
    """

    token_T: Tensor
    position_T: Tensor
    write_T: Tensor  # place in the cache: page * page_tokens + offset
    shares: tuple[int, ...]  # rows of each tp rank, contiguous, in rank order
    prompts: tuple[PromptSegment, ...]
    decode_row_R: Tensor  # ascending
    decode_length_R: Tensor  # keys visible: position + 1
    decode_page_RP: Tensor
    sample_S: Tensor  # rows whose logits are wanted, in the order they are wanted

    @classmethod
    def empty(cls, tp: int, device: torch.device | None = None) -> Batch:
        """What an idle lane computes: nothing."""
        none = torch.empty(0, dtype=torch.int64, device=device)
        return cls(
            token_T=none,
            position_T=none,
            write_T=none,
            shares=(0,) * tp,
            prompts=(),
            decode_row_R=none,
            decode_length_R=none,
            decode_page_RP=none.view(0, 0),
            sample_S=none,
        )

    @property
    def num_rows(self) -> int:
        return len(self.token_T)

    @property
    def device(self) -> torch.device:
        return self.token_T.device

    def to(self, device: torch.device) -> Batch:
        """The same rows, their tensors on `device`; from the CPU in one copy that nobody waits for."""
        if device == self.device:
            return self
        tensors = (
            self.token_T,
            self.position_T,
            self.write_T,
            self.decode_row_R,
            self.decode_length_R,
            self.decode_page_RP,
            self.sample_S,
            *(prompt.page_table for prompt in self.prompts),
        )
        packed_N = to_device(torch.cat([x.flatten() for x in tensors]), device)
        parts = packed_N.split([x.numel() for x in tensors])
        token_T, position_T, write_T, row_R, length_R, page_N, sample_S, *tables = parts
        return Batch(
            token_T=token_T,
            position_T=position_T,
            write_T=write_T,
            shares=self.shares,
            prompts=tuple(
                replace(prompt, page_table=table) for prompt, table in zip(self.prompts, tables, strict=True)
            ),
            decode_row_R=row_R,
            decode_length_R=length_R,
            decode_page_RP=page_N.view(self.decode_page_RP.shape),
            sample_S=sample_S,
        )

    def check(self) -> None:
        """Assert what only a bug of ours could break; a pass over the rows, for tests and debugging."""
        owned = [i for prompt in self.prompts for i in range(prompt.row, prompt.row + prompt.num_rows)]
        owned += self.decode_row_R.tolist()
        assert sorted(owned) == list(range(self.num_rows)), "each row is of one segment or one decode row"
        assert self.decode_row_R.tolist() == sorted(self.decode_row_R.tolist()), "decode rows ascend"
        assert sum(self.shares) == len(self.position_T) == len(self.write_T) == self.num_rows
        assert len(set(self.write_T.tolist())) == self.num_rows, "two rows write to one place"
        assert torch.equal(self.position_T[self.decode_row_R] + 1, self.decode_length_R)
        for prompt in self.prompts:
            expected_T = torch.arange(prompt.start, prompt.start + prompt.num_rows)
            assert torch.equal(self.position_T[prompt.row : prompt.row + prompt.num_rows], expected_T)
