"""A batch of generated rows whose tensors stay where they are: what a recorded step reads.

    row      0   1   2   3 | 4   5   6   7         3 rows and one that is none: of the bucket's, the first
             └── step's ──┘  └── none ───┘         `num_rows` are the step's

Rows that are none are computed like others and go nowhere: they write to spare places of the cache, see one
key that nobody writes, and have no experts. What they give means nothing; a twin makes that NaN.

Batches of all sizes lie in one place: a step reads its own before the next one is written.

Legend: B rows of the bucket, P pages of its tables, t own rows of this tp rank, D hidden width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from k2dist.engine.shares import even_shares
from k2dist.engine.staging import Staging
from k2dist.model.batch import Batch
from k2dist.model.latent_cache import LatentCache
from k2dist.parallel.buckets import Bucket


class StaticRoom:
    """Where static batches of up to `most` are, and what is made of their rows: [B, D] of `width`, in the
    stream's `dtype`."""

    def __init__(self, most: Bucket, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.staging = Staging(most.num_ints, device)
        self.buffer = torch.zeros(most.num_ints, dtype=torch.int64, device=device)
        self.pinned_B = torch.zeros(most.rows, dtype=torch.int64, pin_memory=device.type == "cuda")
        self.hidden_BD = torch.zeros(most.rows, width, dtype=dtype, device=device)


class StaticBatch:
    """See the module. Filled from the room's `Staging`, whose buffers have the same layout."""

    def __init__(
        self,
        bucket: Bucket,
        tp: int,
        tp_rank: int,
        cache: LatentCache,
        room: StaticRoom,
    ) -> None:
        self._bucket = bucket
        self._cache = cache
        shares = even_shares(bucket.rows, tp)
        first = sum(shares[:tp_rank])
        self.buffer = room.buffer[: bucket.num_ints]
        self.hidden_BD = room.hidden_BD[: bucket.rows]
        self._pinned_B = room.pinned_B[: bucket.rows]
        device = room.buffer.device
        self._own_row_t = torch.arange(first, first + shares[tp_rank], device=device)
        self._num_rows_1, self.token_B, position_B, write_B, length_B, sample_B, page_BP = _parts(
            self.buffer, bucket
        )
        self.batch = Batch(
            token_T=self.token_B,
            position_T=position_B,
            write_T=write_B,
            shares=shares,
            prompts=(),
            decode_row_R=torch.arange(bucket.rows, device=device),
            decode_length_R=length_B,
            decode_page_RP=page_BP,
            sample_S=sample_B,
        )

    def is_own_row(self) -> Tensor:
        """Bool [t]: which of this rank's rows are the step's. Computed on the device, in each step anew."""
        return self._own_row_t < self._num_rows_1

    def put_tokens_(self, token_T: Tensor) -> None:
        """The step's tokens, which are known only now, from the CPU."""
        self._pinned_B[: len(token_T)] = token_T
        self.token_B[: len(token_T)].copy_(self._pinned_B[: len(token_T)], non_blocking=True)

    def fill_(self, host: Tensor, batch: Batch) -> None:
        """Write `batch`, of generated rows on the CPU, and rows that are none behind it into `host`."""
        bucket, cache, num_rows = self._bucket, self._cache, batch.num_rows
        assert not batch.prompts, "prompts are not recorded"
        assert num_rows <= bucket.rows, f"{num_rows} rows in a bucket of {bucket.rows}"
        num_rows_1, token_B, position_B, write_B, length_B, sample_B, page_BP = _parts(host, bucket)
        num_rows_1.fill_(num_rows)
        for part_B, rows_T in (
            (token_B, batch.token_T),
            (position_B, batch.position_T),
            (length_B, batch.decode_length_R),
            (sample_B, batch.sample_S),
        ):
            part_B[: len(rows_T)] = rows_T
            part_B[len(rows_T) :] = 0
        length_B[num_rows:] = 1
        write_B[:num_rows] = batch.write_T
        write_B[num_rows:] = torch.arange(
            cache.first_spare + 1, cache.first_spare + 1 + bucket.rows - num_rows
        )
        page_BP.fill_(cache.first_spare // cache.page_tokens)
        page_BP[:num_rows, : batch.decode_page_RP.shape[1]] = batch.decode_page_RP


def _parts(buffer: Tensor, bucket: Bucket) -> tuple[Tensor, ...]:
    """Views: number of rows [1], tokens, positions, places, lengths, samples [B], tables [B, P]."""
    rows, pages = bucket.rows, bucket.pages
    *parts, page_N = buffer.split([1, rows, rows, rows, rows, rows, rows * pages])
    return (*parts, page_N.view(rows, pages))
