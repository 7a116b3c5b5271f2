"""Processes over gloo: the bits of threads, and an end to every wait.

Run as a script this file is one rank: `test_distributed.py PORT WORLD_RANK SIZE OUT`. Two worlds are started
in all (importing torch takes seconds), and each makes every check that needs it.

The scenario is one MoE layer as `decoder` uses comm: lanes gather, compute, reduce; the world exchanges.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.distributed import HashStore

from k2dist.comm import (
    Alone,
    Communicator,
    DistCommunicator,
    Exchange,
    host_store,
    join_store,
    thread_group,
)
from k2dist.comm.roll_call import RollCall
from k2dist.errors import CapacityError, ConfigError, FencedError, PeerError
from k2dist.ids import Generation

ADDRESS = "127.0.0.1"
DEADLINE_S = 40.0  # of calls that must succeed, on a machine with other things to do
WIDTH = 24
TOP_K = 2

# Lanes of each world, by world rank; the world of 4 has one rank with experts and no lane.
LANES = {2: [(0, 1)], 4: [(0, 1, 2, 3), (0, 1), (2,)]}
# [scenario step][lane]: the row shares of its ranks. Lanes without work, ranks without a row.
SHARES = {
    2: [[(3, 2)], [(0, 1)], [(0, 0)]],
    4: [[(2, 1, 0, 3), (4, 3), (2,)], [(1, 0, 0, 0), (0, 0), (3,)], [(0, 0, 0, 0), (0, 0), (0,)]],
}
# Expert -> (rank, slot). In the world of 4, rank 1's experts are chosen by nobody in the second step.
HOMES = {
    2: [(0, 0), (1, 0), (1, 1), (0, 1)],
    4: [(0, 0), (1, 0), (2, 0), (3, 0), (3, 1), (0, 1)],
}

Connect = Callable[[str, tuple[int, ...]], Communicator]


def scenario(world_rank: int, size: int, connect: Connect) -> list[torch.Tensor]:
    """Everything this rank computes, as byte tensors. Inputs follow from the arguments alone."""
    world = connect("world", tuple(range(size)))
    lanes = [
        connect(f"lane{i}", members) if world_rank in members else None
        for i, members in enumerate(LANES[size])
    ]
    results = transport_checks(world)
    with torch.inference_mode():  # as the engine's step
        return results + moe_layers(world, lanes, size)


def moe_layers(world, lanes, size):
    results = []
    exchange = Exchange(world, [HOMES[size]])
    for step, shares_by_lane in enumerate(SHARES[size]):
        for i, shares in enumerate(shares_by_lane):
            order = torch.arange(sum(shares))
            results += moe_layer(exchange, lanes[i], world.rank, shares, step, order)
            # The same rows at other positions of the batch.
            results += moe_layer(exchange, lanes[i], world.rank, shares, step, order.flip(0))
    return results


def moe_layer(
    exchange: Exchange,
    lane: Communicator | None,
    world_rank: int,
    shares: tuple[int, ...],
    step: int,
    order_T: torch.Tensor,
) -> list[torch.Tensor]:
    """This rank's share of rows `order_T` of a lane's batch, through reduce, gather and experts."""
    share_tW = torch.empty(0, WIDTH, dtype=torch.bfloat16)
    row_t = torch.empty(0, dtype=torch.int64)
    results = []
    if lane is not None:
        generator = torch.Generator().manual_seed(100 * step + lane.rank)
        scale = 10.0 ** (lane.rank % 3)  # unlike magnitudes: the order of addition shows in the bits
        partial_TW = torch.randn(len(order_T), WIDTH, generator=generator) * scale
        share_tW = lane.reduce_rows(partial_TW[order_T], shares, torch.bfloat16)
        all_TW = lane.gather_rows(share_tW.to(torch.float8_e4m3fn), shares)
        row_t = order_T.split(list(shares))[lane.rank]
        results += [to_bytes(partial_TW), to_bytes(share_tW), to_bytes(all_TW)]
    num_experts = 3 if step == 1 else len(HOMES[exchange.comm.size])
    first_t = row_t % num_experts
    expert_tK = torch.stack((first_t, (first_t + 2) % num_experts), dim=1)
    work, ticket = exchange.dispatch(0, share_tW, expert_tK)
    out_MW = work.rows_NW[work.row_M].float() * (work.slot_M[:, None] + 1.7 + world_rank)
    out_tKW = exchange.combine(out_MW.to(torch.bfloat16), ticket)
    return [*results, to_bytes(work.rows_NW), work.row_M, work.slot_M, to_bytes(out_tKW)]


def transport_checks(world: Communicator) -> list[torch.Tensor]:
    none, size = [0] * world.size, world.size
    send = [2 * size + 1 if world.rank == 1 else 0] * size
    recv = [2 * size + 1 if r == 1 else 0 for r in range(size)]
    told = [
        world.broadcast_bytes(data * 5000 if world.rank == s else None, s)
        for s in range(size)
        for data in (b"", b"k2")
    ]
    return [
        to_bytes(world.all_to_all_rows(torch.empty(0, 4), none, none)),
        to_bytes(world.all_to_all_rows(torch.full((sum(send), 3), 7.5).to(torch.float8_e4m3fn), send, recv)),
        to_bytes(world.reduce_rows(torch.empty(0, 4), none, torch.bfloat16)),
        torch.tensor(world.exchange_ints([world.rank, -(2**62)])),
        torch.tensor([len(data) for data in told]),
    ]


def to_bytes(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().flatten().view(torch.uint8) if x.numel() else torch.empty(0, dtype=torch.uint8)


# -- one rank, as a process --------------------------------------------------------------------------------


def rank_main(port: int, world_rank: int, size: int, out: Path) -> None:
    store = join_store(ADDRESS, port, DEADLINE_S)

    def connect(
        name: str, members: tuple[int, ...], deadline_s: float = DEADLINE_S, generation: int = 0
    ) -> DistCommunicator:
        return DistCommunicator(
            store,
            generation=Generation(generation),
            name=name,
            members=members,
            world_rank=world_rank,
            address=ADDRESS,
            deadline_s=deadline_s,
            join_deadline_s=DEADLINE_S,
        )

    results: dict[str, object] = {"scenario": scenario(world_rank, size, connect)}
    world = tuple(range(size))
    if size == 2:
        results["fence"] = fenced_while_waiting(connect, world_rank)
    else:
        results["hang"] = peer_that_never_arrives(connect("hang", world, 2.0), world_rank)
        doomed = connect("doomed", world)
        if world_rank == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        results["kill"] = caught(lambda: doomed.exchange_ints([0]))
        results["kill again"] = caught(lambda: doomed.exchange_ints([0]))
        survivors = (0, 1, 3)
        results["next generation"] = connect("world", survivors, generation=1).exchange_ints([world_rank])
    torch.save(results, out)


def fenced_while_waiting(connect, world_rank):
    """Rank 0 waits for rank 1, which does not come, and is fenced by another thread."""
    group, side = connect("fenced", (0, 1)), connect("side", (0, 1))
    result = None
    if world_rank == 0:
        threading.Timer(0.3, group.fence).start()
        started_s = time.monotonic()
        try:
            group.exchange_ints([0])
        except FencedError as error:
            result = str(error), time.monotonic() - started_s
    side.exchange_ints([0])  # the other group lives on
    return result


def peer_that_never_arrives(group, world_rank):
    group.exchange_ints([0])
    if world_rank == 1:
        time.sleep(2.6)
        return None
    if world_rank == 0:
        time.sleep(1.0)  # late, but there when the others give up: it must not be accused
    return caught(lambda: group.exchange_ints([1]))


def caught(call):
    started_s = time.monotonic()
    try:
        call()
    except PeerError as error:
        return error.ranks, str(error), time.monotonic() - started_s
    return None


# -- the tests ---------------------------------------------------------------------------------------------


def gloo_world(size: int, out_dir: Path) -> tuple[list[dict[str, object] | None], list[int]]:
    """What each rank's process saved (None: nothing), and its exit code."""
    store = host_store(ADDRESS)
    outs = [out_dir / f"rank{r}.pt" for r in range(size)]
    command = [sys.executable, "-W", "error", __file__, str(store.port)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    ranks = [subprocess.Popen([*command, str(r), str(size), str(outs[r])], env=env) for r in range(size)]
    try:
        codes = [rank.wait(timeout=100) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    return [torch.load(out, weights_only=True) if out.exists() else None for out in outs], codes


@pytest.fixture(scope="module")
def world_of_2(tmp_path_factory):
    return gloo_world(2, tmp_path_factory.mktemp("gloo2"))


@pytest.fixture(scope="module")
def world_of_4(tmp_path_factory):
    return gloo_world(4, tmp_path_factory.mktemp("gloo4"))


def thread_results(run_ranks, size):
    groups = {f"lane{i}": thread_group(members, DEADLINE_S) for i, members in enumerate(LANES[size])}
    groups["world"] = thread_group(range(size), DEADLINE_S)
    return run_ranks(
        groups["world"],
        lambda comm: scenario(comm.rank, size, lambda name, members: groups[name][members.index(comm.rank)]),
    )


def assert_same(got, want):
    assert len(got) == len(want)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert torch.equal(a, b), f"result {i}"


def test_two_processes_agree_with_threads_bit_for_bit(world_of_2, run_ranks):
    results, codes = world_of_2
    assert codes == [0, 0]
    for got, want in zip(results, thread_results(run_ranks, 2), strict=True):
        assert_same(got["scenario"], want)


def test_a_fence_wakes_a_waiting_process(world_of_2):
    message, waited_s = world_of_2[0][0]["fence"]
    assert "exchange_ints, call 0 of group fenced of generation 0: fenced while waiting" in message
    assert 0.2 < waited_s < 2.0


@pytest.fixture(scope="module")
def threads_of_4(run_ranks):
    return thread_results(run_ranks, 4)


def test_a_row_has_the_same_bits_wherever_it_stands(threads_of_4):
    """Of the tp 4 lane's first step: the reduced rows, forward and flipped, over all shares."""
    per_step = [results[5:] for results in threads_of_4]  # after transport_checks
    forward, flipped = (
        torch.cat([rank[offset + 1] for rank in per_step]).view(-1, WIDTH * 2) for offset in (0, 7)
    )
    assert torch.equal(forward, flipped.flip(0))
    assert len(forward) == sum(SHARES[4][0][0])


def test_survivors_of_four_processes_agree_with_threads_bit_for_bit(world_of_4, threads_of_4):
    results, codes = world_of_4
    assert codes == [0, 0, -signal.SIGKILL, 0]
    for rank in (0, 1, 3):  # rank 2 took part in all of it and died before it could save
        assert_same(results[rank]["scenario"], threads_of_4[rank])


def test_a_peer_that_never_arrives_is_named_within_the_deadline(world_of_4):
    for rank in (0, 3):
        ranks, message, waited_s = world_of_4[0][rank]["hang"]
        assert ranks == (1,)
        assert "exchange_ints, call 1 of group hang of generation 0" in message
        assert waited_s < 2.0 + 1.0  # the deadline, and a busy machine


def test_every_survivor_learns_of_a_killed_peer_and_joins_the_next_generation(world_of_4):
    for rank in (0, 1, 3):
        ranks, message, waited_s = world_of_4[0][rank]["kill"]
        assert ranks == (2,)
        assert "late or dead: rank 2" in message
        assert waited_s < 5.0  # far below the deadline: the connection breaks at once
        assert world_of_4[0][rank]["kill again"][:2] == (ranks, message)
        assert world_of_4[0][rank]["next generation"] == [[0], [1], [3]]


# -- without a second process ------------------------------------------------------------------------------


def one_process(store, **changes):
    arguments = {
        "generation": Generation(0),
        "name": "world",
        "members": (0,),
        "world_rank": 0,
        "address": ADDRESS,
        "deadline_s": 5.0,
        "join_deadline_s": 5.0,
    }
    return DistCommunicator(store, **arguments | changes)


def test_a_process_alone_equals_alone():
    x_TD = torch.randn(5, 3)
    for comm in (one_process(host_store(ADDRESS)), Alone()):
        assert (comm.rank, comm.size) == (0, 1)
        assert torch.equal(comm.reduce_rows(x_TD, [5], torch.bfloat16), x_TD.bfloat16())
        assert torch.equal(comm.gather_rows(x_TD, [5]), x_TD)
        assert torch.equal(comm.all_to_all_rows(x_TD, [5], [5]), x_TD)
        assert comm.exchange_ints([3, 4]) == [[3, 4]]
        assert comm.broadcast_bytes(b"x" * 5000, 0) == b"x" * 5000
        comm.fence()
        for _ in range(2):
            with pytest.raises(FencedError):
                comm.exchange_ints([0])


def test_who_does_not_join_is_named():
    with pytest.raises(
        PeerError, match=r"group world of generation 0: rank 4, 6 did not join within 0\.2 s"
    ) as caught:
        one_process(host_store(ADDRESS), members=(4, 5, 6), world_rank=5, join_deadline_s=0.2)
    assert caught.value.ranks == (4, 6)


def test_an_address_that_is_not_ours_is_refused():
    with pytest.raises(ConfigError, match=r"203\.0\.113\.1 is no address of this machine"):
        one_process(host_store(ADDRESS), address="203.0.113.1")


def test_a_port_in_use_is_refused():
    store = host_store(ADDRESS)
    with pytest.raises(CapacityError, match=f"port {store.port}: .*in use.*choose another"):
        host_store(ADDRESS, store.port)


def test_a_rendezvous_that_does_not_answer_is_named():
    store = host_store(ADDRESS)
    port = store.port
    del store
    with pytest.raises(PeerError, match=f"port {port} did not answer within 0.5 s"):
        join_store(ADDRESS, port, 0.5)


def test_a_roll_call_knows_who_is_missing_and_where():
    store = HashStore()
    calls = [RollCall(store, (7, 8, 9), rank) for rank in range(3)]
    calls[0].report("17")
    calls[2].report("17")
    calls[1].report("16")
    assert calls[0].absent("17", 0.05) == (8,)
    threading.Timer(0.1, calls[1].report, ("17",)).start()
    assert calls[0].absent("17", 10.0) == ()


def test_a_silent_store_accuses_nobody():
    class Silent:
        asked = threading.Event()

        def check(self, keys):
            self.asked.wait(5.0)
            return False

    store = Silent()
    started_s = time.monotonic()
    assert RollCall(store, (0, 1), 0).absent("0", 0.1) == ()
    assert time.monotonic() - started_s < 2.0
    store.asked.set()


if __name__ == "__main__":
    rank_main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
