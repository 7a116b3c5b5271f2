"""Which rows of a lane's step each of its tp ranks keeps."""

from __future__ import annotations


def even_shares(num_rows: int, num_ranks: int) -> tuple[int, ...]:
    """Rows per rank, contiguous and in rank order; the first ones take what is left over."""
    share, rest = divmod(num_rows, num_ranks)
    return tuple(share + (rank < rest) for rank in range(num_ranks))
