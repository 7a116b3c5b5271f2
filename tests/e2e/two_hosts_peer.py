"""One of two peers, each on a host of its own: `python -m tests.e2e.two_hosts_peer RANK ADDRESS [HOST]`.

Rank 0 says the port where they meet, rank 1 is told it, and meets rank 0 at HOST. Then each says what came
from the other, and, once it is told to go on, what became of a second exchange. A line each, in and out.
"""

from __future__ import annotations

import sys

import torch

from k2dist.comm import DistCommunicator, host_store, join_store
from k2dist.errors import PeerError
from k2dist.ids import Generation

DEADLINE_S = 2.0
JOIN_S = 30.0  # both import torch first


def main(rank: int, address: str, host: str | None = None) -> None:
    if host is None:
        store = host_store(address)
        print(store.port, flush=True)
    else:
        store = join_store(host, int(sys.stdin.readline()), JOIN_S)
    comm = DistCommunicator(
        store,
        generation=Generation(0),
        name="hosts",
        members=(0, 1),
        world_rank=rank,
        address=address,
        deadline_s=DEADLINE_S,
        join_deadline_s=JOIN_S,
    )
    rows = [rank, 1 - rank]  # to and from the other one
    x_11 = torch.tensor([[10 + rank]])
    print(comm.all_to_all_rows(x_11, rows, rows).item(), flush=True)
    sys.stdin.readline()
    try:
        comm.all_to_all_rows(x_11, rows, rows)
    except PeerError as error:
        print(error, flush=True)
    else:
        print("it came", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
