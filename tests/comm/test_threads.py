"""Threads agree with the contract; `Alone` is its case of one rank."""

import threading
import time

import pytest
import torch

from k2dist.comm import Alone, thread_group, thread_world
from k2dist.errors import FencedError, PeerError

DEADLINE_S = 20.0
SIZES = [1, 2, 3, 4]
DTYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.uint8]


def worlds(size):
    """Every kind of world of that size that lives in one process."""
    return [thread_world(size, DEADLINE_S)] + ([[Alone()]] if size == 1 else [])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_rows_arrive_by_source(run_ranks, size, dtype):
    # Rank r sends (r * s) % 3 rows to rank s, each of value 10 * r + s: some send nothing to anybody.
    def main(comm):
        send = [(comm.rank * s) % 3 for s in range(size)]
        recv = [(s * comm.rank) % 3 for s in range(size)]
        values = [10 * comm.rank + s for s in range(size) for _ in range(send[s])]
        x_ND = torch.tensor(values).view(-1, 1).repeat(1, 5).to(dtype)
        return comm.all_to_all_rows(x_ND, send, recv)

    for comms in worlds(size):
        for rank, got_ND in enumerate(run_ranks(comms, main)):
            want = [10 * s + rank for s in range(size) for _ in range((s * rank) % 3)]
            assert got_ND.dtype == dtype
            assert (
                got_ND.float().tolist()
                == torch.tensor(want).view(-1, 1).repeat(1, 5).to(dtype).float().tolist()
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_sums_run_in_rank_order_and_round_once(run_ranks, size, dtype):
    shares = [3, 0, 5, 1][:size]
    # Magnitudes far apart: any other order of addition gives other bits.
    addends = [torch.randn(sum(shares), 7) * 10.0 ** (3 * r) for r in (2, 0, 3, 1)[:size]]
    want_TD = addends[0].clone()
    for x_TD in addends[1:]:
        want_TD = want_TD + x_TD
    for comms in worlds(size):
        got = run_ranks(comms, lambda comm: comm.reduce_rows(addends[comm.rank], shares, dtype))
        assert [len(x) for x in got] == shares
        assert torch.equal(torch.cat(got), want_TD.to(dtype))


@pytest.mark.parametrize("size", SIZES)
def test_every_rank_gathers_all_rows_in_rank_order(run_ranks, size):
    shares = [0, 4, 1, 0][:size]
    parts = [torch.randn(share, 3).to(torch.float8_e4m3fn) for share in shares]
    want_TB = torch.cat([part.view(torch.uint8) for part in parts])
    for comms in worlds(size):
        for got_TD in run_ranks(comms, lambda comm: comm.gather_rows(parts[comm.rank], shares)):
            assert torch.equal(got_TD.view(torch.uint8), want_TB)


@pytest.mark.parametrize("size", SIZES)
def test_calls_without_a_single_row(run_ranks, size):
    def main(comm):
        none = [0] * size
        return (
            comm.all_to_all_rows(torch.empty(0, 4), none, none).shape,
            comm.reduce_rows(torch.empty(0, 4), none, torch.bfloat16).shape,
            comm.gather_rows(torch.empty(0, 4), none).shape,
            comm.exchange_ints([]),
        )

    for comms in worlds(size):
        for got in run_ranks(comms, main):
            assert got == ((0, 4), (0, 4), (0, 4), [[]] * size)


@pytest.mark.parametrize("size", SIZES)
def test_ints_and_bytes(run_ranks, size):
    frames = [b"", b"plan", bytes(4087), bytes(4088), bytes(4089), bytes(range(256)) * 100]

    def main(comm):
        ints = comm.exchange_ints([comm.rank, -(2**62), 2**62 + 1])
        told = [
            comm.broadcast_bytes(frame if comm.rank == source else None, source)
            for frame in frames
            for source in range(size)
        ]
        return ints, told

    for comms in worlds(size):
        for ints, told in run_ranks(comms, main):
            assert ints == [[r, -(2**62), 2**62 + 1] for r in range(size)]
            assert told == [frame for frame in frames for _ in range(size)]


@pytest.mark.parametrize("size", [1, 2])
def test_results_are_nobodys_memory(run_ranks, size):
    one = [1] * size
    calls = {
        "all_to_all": lambda comm, x_TD: comm.all_to_all_rows(x_TD, one, one),
        "reduce": lambda comm, x_TD: comm.reduce_rows(x_TD, one, torch.float32),
        "gather": lambda comm, x_TD: comm.gather_rows(x_TD[:1], one),
    }
    want = {"all_to_all": list(range(size)), "reduce": [sum(range(size))], "gather": list(range(size))}

    def main(comm):
        for name, call in list(calls.items()) * 30:
            x_TD = torch.full((size, 100_000), float(comm.rank))
            got = call(comm, x_TD)
            x_TD.fill_(99.0)  # at once, while a slower rank may still read
            comm.exchange_ints([0])
            assert got[:, 0].tolist() == got[:, -1].tolist() == want[name]

    for comms in worlds(size):
        run_ranks(comms, main)


def test_a_fast_rank_may_be_a_call_ahead(run_ranks):
    def main(comm):
        told = []
        for i in range(200):
            if comm.rank == i % 3:
                time.sleep(0.0005)
            told.append(comm.exchange_ints([i, comm.rank]))
        return told

    for told in run_ranks(thread_world(3, DEADLINE_S), main):
        assert told == [[[i, r] for r in range(3)] for i in range(200)]


def test_late_ranks_are_named_within_the_deadline(run_ranks):
    def main(comm):
        if comm.rank in (1, 3):
            return None
        started_s = time.monotonic()
        with pytest.raises(PeerError) as caught:
            comm.exchange_ints([0])
        return caught.value, time.monotonic() - started_s

    comms = thread_group((4, 5, 6, 7), 0.3)
    for result in run_ranks(comms, main)[::2]:
        error, waited_s = result
        assert error.ranks == (5, 7)
        assert "rank 5, 7 did not arrive within 0.3 s" in str(error)
        assert waited_s < 5.0
    with pytest.raises(PeerError, match="rank 5, 7"):  # the latecomer learns that the group has ended
        comms[1].exchange_ints([0])


def test_a_fence_wakes_everyone_who_waits(run_ranks):
    comms = thread_world(3, 60.0)
    threading.Timer(0.2, comms[2].fence).start()

    def main(comm):
        if comm.rank == 2:
            return
        with pytest.raises(FencedError, match="exchange_ints"):
            comm.exchange_ints([0])

    started_s = time.monotonic()
    run_ranks(comms, main)
    assert time.monotonic() - started_s < 10.0
    for comm in comms:
        with pytest.raises(FencedError):
            comm.broadcast_bytes(b"", 0)


def test_a_fenced_rank_alone_stops_too():
    comm = Alone()
    comm.fence()
    for call in (
        lambda: comm.all_to_all_rows(torch.empty(0, 1), [0], [0]),
        lambda: comm.reduce_rows(torch.empty(0, 1), [0], torch.float32),
        lambda: comm.gather_rows(torch.empty(0, 1), [0]),
        lambda: comm.exchange_ints([0]),
        lambda: comm.broadcast_bytes(b"", 0),
    ):
        with pytest.raises(FencedError):
            call()


def test_ranks_that_make_different_calls_are_told(run_ranks):
    def main(comm):
        with pytest.raises(AssertionError, match=r"ranks differ.*exchange_ints.*gather_rows"):
            comm.exchange_ints([0]) if comm.rank == 0 else comm.gather_rows(torch.empty(1, 1), [1, 1])

    run_ranks(thread_world(2, DEADLINE_S), main)


def test_counts_must_fit_the_rows():
    for comm in (Alone(), thread_world(1, DEADLINE_S)[0]):
        with pytest.raises(AssertionError, match="2 rows to send, 3 given"):
            comm.all_to_all_rows(torch.empty(3, 1), [2], [2])
        with pytest.raises(AssertionError, match="float32"):
            comm.reduce_rows(torch.empty(3, 1, dtype=torch.bfloat16), [3], torch.bfloat16)
