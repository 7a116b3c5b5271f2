"""NCCL: what surrounds it with a group that is made up, and NCCL itself where there is a device.

The made-up group is alone, moves rows at once, and completes calls when told; everything else is real.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributed import HashStore, Store

from k2dist.comm import Alone, Communicator, Exchange, NcclCommunicator
from k2dist.errors import ConfigError, FencedError, PeerError
from k2dist.ids import Generation, SlotId, WorldRank


class MadeUpWork:
    def __init__(self, group: MadeUpGroup) -> None:
        self._group = group

    def is_completed(self) -> bool:
        return self._group.completes or self._group.is_aborted.is_set()

    def wait(self) -> bool:
        return True  # the stream would


class MadeUpGroup:
    def __init__(self, *, completes: bool = True) -> None:
        self.completes = completes
        self.succeeds = True
        self.is_aborted = threading.Event()

    def alltoall_base(self, out: Tensor, x: Tensor, recv: list[int], send: list[int]) -> MadeUpWork:
        assert recv == send
        if not self.succeeds:
            raise RuntimeError("unhandled system error, NCCL version 2.27. Details: none")
        if self.completes:
            out.copy_(x)
        return MadeUpWork(self)

    def abort(self) -> None:
        self.is_aborted.set()


def join(group: MadeUpGroup, deadline_s: float = 20.0, join_deadline_s: float = 20.0) -> NcclCommunicator:
    class Surrounded(NcclCommunicator):
        def _make_group(self, store: Store) -> MadeUpGroup:  # type: ignore[override]
            return group

        def _queued(self) -> MadeUpWork:  # type: ignore[override]
            return MadeUpWork(group)

    return nccl(Surrounded, torch.device("cpu"), deadline_s, join_deadline_s)


def nccl(
    kind: type[NcclCommunicator], device: torch.device, deadline_s: float, join_deadline_s: float
) -> NcclCommunicator:
    return kind(
        HashStore(),
        generation=Generation(0),
        name="world",
        members=(3,),
        world_rank=3,
        device=device,
        deadline_s=deadline_s,
        join_deadline_s=join_deadline_s,
    )


def layer(comm: Communicator, device: torch.device) -> list[Tensor]:
    """One MoE layer's calls, and all the others, on the CPU at the end."""
    x = torch.arange(60.0, device=device).view(5, 12)
    rows = x.to(torch.float8_e4m3fn)
    experts = torch.tensor([[0, 2], [1, 0], [2, 1], [0, 1], [1, 2]])
    exchange = Exchange(comm, [[(WorldRank(0), SlotId(slot)) for slot in (2, 0, 1)]])
    work, ticket = exchange.dispatch(0, rows.cpu(), experts)
    home = exchange.combine(work.rows_NW[work.row_M].float() * (1 + work.slot_M[:, None]), ticket)
    found = [
        comm.all_to_all_rows(rows, [5], [5]).float(),
        comm.all_to_all_rows(x[:0], [0], [0]),
        comm.gather_rows(x.to(torch.bfloat16), [5]).float(),
        comm.reduce_rows(x / 3, [5], torch.bfloat16).float(),
    ]
    assert all(one.device.type == device.type for one in found), "rows stay where they are"
    assert comm.exchange_ints([7, -2]) == [[7, -2]]
    assert comm.broadcast_bytes(b"plan" * 3000, 0) == b"plan" * 3000
    comm.settle()
    return [home, *(one.cpu() for one in found)]


def same_bits(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_all_above_the_transport_has_the_bits_of_alone() -> None:
    cpu = torch.device("cpu")
    assert same_bits(layer(join(MadeUpGroup()), cpu), layer(Alone(), cpu))


def failure(work: Callable[[], object], kind: type[Exception]) -> tuple[str, float]:
    began_s = time.monotonic()
    with pytest.raises(kind) as caught:
        work()
    return str(caught.value), time.monotonic() - began_s


def test_a_call_that_does_not_complete_is_aborted_at_the_deadline() -> None:
    group = MadeUpGroup()
    comm = join(group, deadline_s=1.0)
    group.completes = False
    x = torch.zeros(2, 3)
    comm.gather_rows(x, [2])  # queued: the host does not wait
    message, took_s = failure(comm.settle, PeerError)
    assert "settle, after call 0 of group world of generation 0: not complete within 1 s" in message
    assert took_s >= 0.7, "the rest of the deadline goes to asking who is late"
    assert group.is_aborted.wait(10), "or its kernels would keep the device"
    again, _ = failure(lambda: comm.gather_rows(x, [2]), PeerError)
    assert again == message, "it has ended for good"


def test_a_fence_ends_the_call_under_way() -> None:
    group = MadeUpGroup()
    comm = join(group, deadline_s=60.0)
    group.completes = False
    threading.Timer(0.2, comm.fence).start()
    _, took_s = failure(lambda: comm.exchange_ints([1]), FencedError)
    assert took_s < 20
    assert group.is_aborted.wait(10)


def test_a_fence_frees_the_device_though_nobody_waits() -> None:
    """What was queued ends, and nobody takes that for its result."""
    group = MadeUpGroup()
    comm = join(group, deadline_s=60.0)
    group.completes = False
    comm.gather_rows(torch.zeros(2, 3), [2])
    comm.fence()
    assert group.is_aborted.wait(10)
    failure(comm.settle, FencedError)


def test_an_error_that_nccl_reports_names_the_call() -> None:
    group = MadeUpGroup()
    comm = join(group)
    group.succeeds = False
    message, _ = failure(lambda: comm.exchange_ints([1]), PeerError)
    assert "exchange_ints, call 0" in message
    assert "unhandled system error" in message
    assert group.is_aborted.wait(10)


def test_connecting_has_the_join_deadline() -> None:
    group = MadeUpGroup(completes=False)
    message, took_s = failure(lambda: join(group, join_deadline_s=0.3), PeerError)
    assert message == "group world of generation 0: NCCL did not connect within 0.3 s"
    assert took_s < 20
    assert group.is_aborted.wait(10)


@pytest.mark.skipif(torch.distributed.is_nccl_available(), reason="this torch has NCCL")
def test_a_torch_without_nccl_is_named() -> None:
    with pytest.raises(ConfigError, match="without NCCL"):
        nccl(NcclCommunicator, torch.device("cpu"), 1.0, 1.0)


@pytest.mark.gpu
def test_calls_over_nccl_are_recorded_and_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has not run yet."""
    from k2dist.comm.nccl import ENVIRONMENT

    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    cuda = torch.device("cuda", 0)
    comm = nccl(NcclCommunicator, cuda, 60.0, 60.0)
    x_ND, graph = torch.zeros(5, 12, device=cuda), torch.cuda.CUDAGraph()
    comm.all_to_all_rows(x_ND, [5], [5])
    comm.settle()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        out_ND = comm.all_to_all_rows(x_ND, [5], [5])
        sum_ND = comm.reduce_rows(x_ND, [5], torch.bfloat16)
    for value in (1.0, 2.0):
        x_ND.fill_(value)
        graph.replay()
        comm.settle()
        assert torch.equal(out_ND, x_ND)
        assert torch.equal(sum_ND, x_ND.bfloat16())
    comm.fence()


@pytest.mark.gpu
def test_nccl_alone_has_the_bits_of_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two generations, one after the other. Has not run yet."""
    from k2dist.comm.nccl import ENVIRONMENT

    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    cuda = torch.device("cuda", 0)
    expected = layer(Alone(), torch.device("cpu"))
    for _ in range(2):
        comm = nccl(NcclCommunicator, cuda, 60.0, 60.0)
        assert same_bits(layer(comm, cuda), expected)
        comm.fence()
        with pytest.raises(FencedError):
            comm.exchange_ints([1])
