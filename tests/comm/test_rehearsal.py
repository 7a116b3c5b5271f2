"""A rank among made-up peers: everything that can be known of what it receives is as from real ones."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from k2dist.comm import Alone, Communicator, Exchange, PeerRows, RehearsalCommunicator, RehearsalWorld
from k2dist.ids import SlotId, WorldRank

WIDTH, TOP_K = 24, 3


def some_peers(counts: Sequence[int], num_slots: int) -> PeerRows:
    """Rows for one or two slots each."""
    slots = torch.full((sum(counts), TOP_K), -1, dtype=torch.int32)
    for row in slots:
        row[torch.randint(TOP_K, ())] = int(torch.randint(num_slots, ()))
    return PeerRows(tuple(counts), slots)


def even_homes(size: int, num_experts: int) -> list[list[tuple[WorldRank, SlotId]]]:
    """One layer: experts in runs."""
    each = num_experts // size
    return [[(WorldRank(e // each), SlotId(e % each)) for e in range(num_experts)]]


def some_rows(num_rows: int, num_experts: int) -> tuple[Tensor, Tensor]:
    rows = torch.randn(num_rows, WIDTH).to(torch.bfloat16)
    experts = torch.rand(num_rows, num_experts).topk(TOP_K).indices
    return rows, experts


def world_of(rank: int, size: int, peers: Sequence[PeerRows]) -> RehearsalWorld:
    return RehearsalWorld(rank, size, peers, torch.randn(5, WIDTH).to(torch.bfloat16))


def test_alone_every_collective_has_the_bits_of_alone() -> None:
    here, alone = RehearsalCommunicator(0, 1), Alone()
    for num_rows in (0, 1, 7):
        x = torch.randn(num_rows, WIDTH)
        calls: list[Callable[[Communicator], object]] = [
            lambda comm, x=x: comm.all_to_all_rows(x, [len(x)], [len(x)]),
            lambda comm, x=x: comm.gather_rows(x, [len(x)]),
            lambda comm, x=x: comm.reduce_rows(x, [len(x)], torch.bfloat16),
        ]
        for call in calls:
            mine, its = call(here), call(alone)
            assert isinstance(mine, Tensor)
            assert isinstance(its, Tensor)
            assert (mine.dtype, mine.shape) == (its.dtype, its.shape)
            assert torch.equal(mine, its)
    assert here.exchange_ints([3, -1]) == alone.exchange_ints([3, -1])
    assert here.broadcast_bytes(b"plan", 0) == b"plan"
    assert (here.num_bytes_sent, here.num_bytes_received) == (0, 0)


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_shapes_and_bytes_are_those_of_a_real_group(
    rank: int, run_ranks: Callable[[Sequence[Communicator], Callable[[Communicator], object]], list[object]]
) -> None:
    from k2dist.comm import thread_world

    shares = [3, 0, 4, 2]

    def rank_main(comm: Communicator) -> tuple[tuple[torch.Size, torch.dtype], ...]:
        gathered = comm.gather_rows(torch.randn(shares[comm.rank], WIDTH).to(torch.bfloat16), shares)
        reduced = comm.reduce_rows(torch.randn(sum(shares), WIDTH), shares, torch.bfloat16)
        return (gathered.shape, gathered.dtype), (reduced.shape, reduced.dtype)

    real = run_ranks(thread_world(4, 30.0), rank_main)[rank]
    rehearsed = RehearsalCommunicator(rank, 4)
    assert rank_main(rehearsed) == real
    own, others = shares[rank], sum(shares) - shares[rank]
    assert rehearsed.num_bytes_sent == 3 * own * WIDTH * 2 + others * WIDTH * 4
    assert rehearsed.num_bytes_received == others * WIDTH * 2 + 3 * own * WIDTH * 4


def test_own_rows_come_back_in_their_place() -> None:
    comm = RehearsalCommunicator(1, 3)
    x = torch.arange(12.0).view(6, 2)
    out = comm.all_to_all_rows(x, [1, 2, 3], [4, 2, 0])
    assert torch.equal(out[4:6], x[1:3])
    assert {tuple(row) for row in out.tolist()} <= {tuple(row) for row in x.tolist()}, "plausible: real rows"


@pytest.mark.parametrize("num_rows", [0, 1, 9])
def test_an_exchange_computes_what_peers_were_drawn_to_send(num_rows: int) -> None:
    size, rank, num_experts = 4, 2, 12
    peers = [some_peers([5, 0, 0, 3], 3), some_peers([1, 2, 0, 0], 3)]
    comm = world_of(rank, size, peers)
    exchange = Exchange(comm, even_homes(size, num_experts) * 2)
    for layer in (0, 1, 0, 1):
        rows, experts = some_rows(num_rows, num_experts)
        work, ticket = exchange.dispatch(layer, rows, experts)
        own = ((experts >= 6) & (experts < 9)).sum().item()
        drawn = peers[layer].slot_NK
        assert len(work.row_M) == own + (drawn >= 0).sum()
        arrived_own = int(((experts >= 6) & (experts < 9)).any(1).sum())
        assert len(work.rows_NW) == arrived_own + len(drawn)
        of_peers = drawn[drawn >= 0].bincount(minlength=3)
        of_own = (experts[(experts >= 6) & (experts < 9)] - 6).bincount(minlength=3)
        assert torch.equal(work.counts_per_slot, of_peers + of_own)
        home = exchange.combine(torch.randn(len(work.row_M), WIDTH), ticket)
        assert home.shape == (num_rows, TOP_K, WIDTH)
        assert home.isfinite().all()


def test_own_pairs_have_the_outputs_of_their_own_experts() -> None:
    """What is made up stays beside what is real: no peer's output takes the place of one's own."""
    size, rank, num_experts = 4, 1, 12
    exchange = Exchange(world_of(rank, size, [some_peers([4, 0, 2, 2], 3)]), even_homes(size, num_experts))
    rows, experts = some_rows(8, num_experts)
    work, ticket = exchange.dispatch(0, rows, experts)
    out = work.rows_NW[work.row_M].float() + work.slot_M[:, None]
    home = exchange.combine(out, ticket)
    here = (experts >= 3) & (experts < 6)
    expected = rows[:, None].float() + (experts - 3)[..., None]
    assert here.any()
    assert torch.equal(home[here], expected.expand_as(home)[here])


def test_an_exchange_alone_is_that_of_alone() -> None:
    comm = world_of(0, 1, [PeerRows((0,), torch.empty(0, TOP_K, dtype=torch.int32))])
    rows, experts = some_rows(6, 12)
    outputs = []
    for exchange in (Exchange(comm, even_homes(1, 12)), Exchange(Alone(), even_homes(1, 12))):
        work, ticket = exchange.dispatch(0, rows, experts)
        outputs.append(exchange.combine(work.rows_NW[work.row_M] * (1 + work.slot_M[:, None]), ticket))
    assert torch.equal(outputs[0], outputs[1])


def test_room_beyond_a_peers_rows_belongs_to_nobody() -> None:
    """As with fixed capacities: no count is exchanged, and each rank has the same number of places."""
    comm = world_of(0, 2, [some_peers([0, 2], 3)])
    slot_bytes, capacity = 4 * TOP_K, 4
    own = torch.randint(256, (capacity, 2 * WIDTH + slot_bytes), dtype=torch.uint8)
    arrived = comm.all_to_all_rows(own.repeat(2, 1), [capacity] * 2, [capacity] * 2)
    slots = arrived[:, 2 * WIDTH :].contiguous().view(torch.int32)
    assert torch.equal(arrived[:capacity], own)
    assert (slots[capacity : capacity + 2] >= 0).any(1).all()
    assert (slots[capacity + 2 :] == -1).all()


def test_the_same_rank_receives_the_same_in_every_run() -> None:
    seed = random.randrange(2**31)
    arrived = []
    for _ in range(2):
        torch.manual_seed(seed)
        exchange = Exchange(world_of(0, 4, [some_peers([0, 3, 1, 2], 3)]), even_homes(4, 12))
        arrived.append(exchange.dispatch(0, *some_rows(5, 12))[0].rows_NW)
    assert torch.equal(arrived[0], arrived[1])


def test_making_up_is_set_aside() -> None:
    entered: list[str] = []

    @contextmanager
    def aside() -> Iterator[None]:
        entered.append("in")
        yield
        entered.append("out")

    comm = RehearsalWorld(0, 2, [some_peers([0, 2], 6)], torch.randn(1, WIDTH).to(torch.bfloat16), aside)
    exchange = Exchange(comm, even_homes(2, 12))
    work, ticket = exchange.dispatch(0, *some_rows(3, 12))
    assert entered == ["in", "out"] * 2, "counts, rows"
    exchange.combine(torch.zeros(len(work.row_M), WIDTH), ticket)
    assert entered == ["in", "out"] * 3
