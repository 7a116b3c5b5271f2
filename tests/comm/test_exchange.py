"""Both exchanges against a twin that looks at every row of every rank in plain loops."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from k2dist.comm import Alone, Capacity, CapacityRule, Exchange, PaddedExchange, thread_world
from k2dist.planner.layer_bytes import EvenLayer, LayerBytes

DEADLINE_S = 30.0
WIDTH = 5


@dataclass(frozen=True)
class Case:
    """`experts[rank][row]`: its K experts. `homes[source][expert]`: (rank, slot) that this source uses."""

    top_k: int
    experts: tuple[tuple[tuple[int, ...], ...], ...]
    homes: tuple[tuple[tuple[int, int], ...], ...]

    def chosen(self, rank):
        return torch.tensor(self.experts[rank], dtype=torch.int64).view(-1, self.top_k)

    def rows(self, rank, dtype):
        num_rows = len(self.experts[rank])
        # Every row of the world is different, and exact in every dtype.
        return (torch.arange(num_rows)[:, None] + 20 * rank + torch.zeros(WIDTH)).to(dtype)


@st.composite
def cases(draw, max_size=4):
    size = draw(st.integers(1, max_size))
    num_experts = draw(st.integers(1, 6))
    top_k = draw(st.integers(1, num_experts))
    # Slots: each rank holds some set of experts, every expert has a copy somewhere.
    held = [set(draw(st.sets(st.integers(0, num_experts - 1)))) for _ in range(size)]
    for expert in range(num_experts):
        if not any(expert in on_rank for on_rank in held):
            held[draw(st.integers(0, size - 1))].add(expert)
    slots = [{expert: slot for slot, expert in enumerate(draw(st.permutations(sorted(h))))} for h in held]

    def home(source, expert):
        if expert in slots[source]:
            return source, slots[source][expert]
        rank = draw(st.sampled_from([r for r in range(size) if expert in slots[r]]))
        return rank, slots[rank][expert]

    homes = tuple(tuple(home(source, expert) for expert in range(num_experts)) for source in range(size))
    row = st.permutations(range(num_experts)).map(lambda order: tuple(order[:top_k]))
    experts = tuple(tuple(draw(st.lists(row, max_size=4))) for _ in range(size))
    return Case(top_k, experts, homes)


def exchange_once(case, run_ranks, dtype, comms, capacity):
    """Dispatch, mark each pair with where it was computed, combine. Padded where there is a `capacity`.

    By rank: what came, what came home, the counters, whether it knows of an overflow. Outputs of pairs that
    are nobody's are NaN.
    """

    def main(comm):
        exact = Exchange(comm, [case.homes[comm.rank]])
        exchange = exact if capacity is None else PaddedExchange(exact, capacity)
        work, ticket = exchange.dispatch(0, case.rows(comm.rank, dtype), case.chosen(comm.rank))
        out_TKD = exchange.combine(marked(work, comm.rank), ticket)
        return work, out_TKD, exact, capacity is not None and exchange.has_overflowed()

    return run_ranks(comms, main)


def marked(work, rank):
    """Outputs that say which row they are of and where they were computed."""
    mark_M = torch.full((len(work.row_M), 1), rank)
    out_MD = torch.cat((work.rows_NW[work.row_M].float(), work.slot_M[:, None], mark_M), dim=1)
    out_MD[work.counts_per_slot.sum() :] = torch.nan
    return out_MD.to(torch.bfloat16)


def check(case, run_ranks, dtype, comms, capacity=None):
    """`exchange_once`, compared with the twin."""
    results = exchange_once(case, run_ranks, dtype, comms, capacity)
    for rank, (work, out_TKD, exchange, has_overflowed) in enumerate(results):
        assert not has_overflowed
        pairs = arriving_pairs(case, rank)
        num_pairs, num_arrived = len(pairs), len({(source, row) for _, source, row in pairs})
        assert work.slot_M[:num_pairs].tolist() == [slot for slot, _, _ in pairs]
        want_MW = (
            torch.stack([case.rows(source, dtype)[row].float() for _, source, row in pairs]) if pairs else []
        )
        assert work.rows_NW.dtype == dtype
        found_MW = work.rows_NW[work.row_M[:num_pairs]].float()
        assert found_MW.tolist() == list(map(list, torch.as_tensor(want_MW).tolist()))
        if capacity is None:
            assert (len(work.slot_M), len(work.rows_NW)) == (num_pairs, num_arrived), "a row came twice"
        else:
            size = len(case.homes)
            assert work.slot_M[num_pairs:].tolist() == [-1] * (size * capacity.pairs - num_pairs)
            assert len(work.rows_NW) == size * capacity.rows
        num_slots = len(work.counts_per_slot)
        assert work.counts_per_slot.tolist() == [sum(p[0] == s for p in pairs) for s in range(num_slots)]
        assert exchange.expert_load() == (tuple(work.counts_per_slot.tolist()),)
        assert out_TKD.dtype == torch.bfloat16
        assert out_TKD.tolist() == want_home(case, rank, dtype)
        assert exchange.num_rows_sent == rows_that_left(case, rank)


def arriving_pairs(case, rank):
    """(slot, source rank, source row) of all pairs for `rank`'s slots, sorted."""
    return sorted(
        (case.homes[source][expert][1], source, row)
        for source, rows in enumerate(case.experts)
        for row, experts in enumerate(rows)
        for expert in experts
        if case.homes[source][expert][0] == rank
    )


def want_home(case, rank, dtype):
    rows_TW = case.rows(rank, dtype).float().tolist()
    return [
        [[*row, case.homes[rank][expert][1], case.homes[rank][expert][0]] for expert in experts]
        for row, experts in zip(rows_TW, case.experts[rank], strict=True)
    ]


def rows_that_left(case, rank):
    return sum(
        len({case.homes[rank][expert][0] for expert in experts} - {rank}) for experts in case.experts[rank]
    )


@settings(deadline=None, max_examples=120)
@given(case=cases(), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.uint8]))
def test_any_world_of_threads_equals_the_twin(case, dtype, run_ranks):
    check(case, run_ranks, dtype, thread_world(len(case.homes), DEADLINE_S))


@settings(deadline=None, max_examples=80)
@given(case=cases(), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.uint8]), data=st.data())
def test_frames_with_room_for_all_bring_what_the_exact_exchange_does(case, dtype, data, run_ranks):
    """Just enough room, or up to three places more."""
    rows, pairs = most_in_a_frame(case)
    capacity = Capacity(
        max(rows, 1) + data.draw(st.integers(0, 3)), max(pairs, 1) + data.draw(st.integers(0, 3))
    )
    check(case, run_ranks, dtype, thread_world(len(case.homes), DEADLINE_S), capacity)


@settings(deadline=None, max_examples=80)
@given(case=cases(), room=st.builds(Capacity, st.integers(1, 4), st.integers(1, 8)))
def test_an_overflow_anywhere_is_known_to_all(case, room, run_ranks):
    rows, pairs = most_in_a_frame(case)
    results = exchange_once(case, run_ranks, torch.float32, thread_world(len(case.homes), DEADLINE_S), room)
    told = [has_overflowed for _, _, _, has_overflowed in results]
    assert told == [rows > room.rows or pairs > room.pairs] * len(case.homes)


def most_in_a_frame(case):
    """Of rows, and of pairs, that any rank has for any rank."""
    frames = [
        [sum(case.homes[source][expert][0] == rank for expert in experts) for experts in rows]
        for source, rows in enumerate(case.experts)
        for rank in range(len(case.homes))
    ]
    return max(sum(n > 0 for n in frame) for frame in frames), max(sum(frame) for frame in frames)


@pytest.mark.parametrize("capacity", [None, Capacity(4, 24)], ids=["exact", "padded"])
@settings(deadline=None, max_examples=60)
@given(case=cases(max_size=1))
def test_alone_equals_the_twin(case, capacity, run_ranks):
    check(case, run_ranks, torch.float32, [Alone()], capacity)


NOBODY_HAS_ROWS = Case(2, ((), ()), (((0, 0), (1, 0)),) * 2)
ALL_TO_ONE_RANK = Case(3, (((0, 1, 2), (2, 0, 1)), ((1, 2, 0),)), (((1, 2), (1, 0), (1, 1)),) * 2)
RANK_2_GETS_NOTHING = Case(1, (((0,),), ((1,), (0,)), ((0,),)), (((0, 0), (1, 0), (2, 0)),) * 3)


@pytest.mark.parametrize("capacity", [None, Capacity(2, 6)], ids=["exact", "padded"])
@pytest.mark.parametrize(
    "case",
    [NOBODY_HAS_ROWS, ALL_TO_ONE_RANK, RANK_2_GETS_NOTHING],
    ids=["no rows", "one rank", "no receiver"],
)
def test_edges(case, capacity, run_ranks):
    check(case, run_ranks, torch.bfloat16, thread_world(len(case.homes), DEADLINE_S), capacity)


def test_a_row_with_two_experts_on_a_rank_travels_once(run_ranks):
    """Two rows to rank 1, each wanting both its experts: 2 rows cross, 4 outputs come back."""
    case = Case(2, (((0, 1), (1, 0)), ()), (((1, 0), (1, 1)),) * 2)
    comms = thread_world(2, DEADLINE_S)

    def main(comm):
        exchange = Exchange(comm, [case.homes[comm.rank]])
        work, ticket = exchange.dispatch(0, case.rows(comm.rank, torch.uint8), case.chosen(comm.rank))
        exchange.combine(torch.zeros(len(work.row_M), 3, dtype=torch.uint8), ticket)
        return exchange, work

    (home, _), (away, work) = run_ranks(comms, main)
    assert len(work.rows_NW) == 2
    assert len(work.row_M) == 4
    assert (home.num_rows_sent, away.num_rows_sent) == (2, 0)
    assert home.num_bytes_sent == 2 * (WIDTH + 2 * 4)  # a slot is 4 bytes
    assert away.num_bytes_sent == 4 * 3


def test_layers_have_their_own_homes_and_load():
    exchange = Exchange(Alone(), [[(0, 0), (0, 1)], [(0, 1), (0, 0)]])
    expert_TK = torch.tensor([[0], [0], [1]])
    for layer, want in ((0, [0, 0, 1]), (1, [0, 1, 1])):
        work, _ = exchange.dispatch(layer, torch.zeros(3, 1), expert_TK)
        assert work.slot_M.tolist() == want
    exchange.dispatch(1, torch.zeros(3, 1), expert_TK)
    assert exchange.expert_load() == ((2, 1), (2, 4))


def test_an_overflow_is_remembered_through_the_layers_that_follow(run_ranks):
    """Rank 1 overflows in layer 0 and in none after it; a further step begins anew."""

    def main(comm):
        exact = Exchange(comm, [[(0, 0), (1, 0)]] * 2)
        first, second = (PaddedExchange(exact, Capacity(1, 2)) for _ in range(2))
        told = []
        for exchange in (first, second):
            for layer, num_rows in enumerate((2, 1)):
                num_rows = num_rows if comm.rank == 1 and exchange is first else 1
                expert_TK = torch.zeros(num_rows, 1, dtype=torch.int64)
                exchange.dispatch(layer, torch.zeros(num_rows, 3), expert_TK)
                told.append(exchange.has_overflowed())
        first.begin()
        assert not first.has_overflowed()
        return told

    assert run_ranks(thread_world(2, DEADLINE_S), main) == [[True, True, False, False]] * 2


@pytest.mark.parametrize(("max_size", "capacity"), [(4, Capacity(8, 48)), (1, None)], ids=["frames", "alone"])
@settings(deadline=None, max_examples=60)
@given(data=st.data(), num_more=st.integers(1, 3))
def test_rows_that_are_none_are_nowhere(max_size, capacity, data, num_more, run_ranks):
    """Behind its rows each rank has some that are none: NaN, with experts of their own. Nobody gets them."""
    case = data.draw(cases(max_size=max_size))

    def main(comm):
        exact = Exchange(comm, [case.homes[comm.rank]])
        exchange = PaddedExchange(exact, capacity)
        rows_TW, expert_TK = case.rows(comm.rank, torch.float32), case.chosen(comm.rank)
        num_rows = len(rows_TW)
        rows_TW = torch.cat((rows_TW, torch.full((num_more, WIDTH), torch.nan)))
        expert_TK = torch.cat((expert_TK, torch.arange(case.top_k).expand(num_more, -1)))
        exchange.begin(torch.arange(num_rows + num_more) < num_rows)
        work, ticket = exchange.dispatch(0, rows_TW, expert_TK)
        out_TKD = exchange.combine(marked(work, comm.rank), ticket)
        assert not exchange.has_overflowed()
        return work, out_TKD[:num_rows], exact

    comms = thread_world(len(case.homes), DEADLINE_S) if max_size > 1 else [Alone()]
    for rank, (work, out_TKD, exact) in enumerate(run_ranks(comms, main)):
        pairs = arriving_pairs(case, rank)
        assert work.slot_M[: len(pairs)].tolist() == [slot for slot, _, _ in pairs]
        assert set(work.slot_M[len(pairs) :].tolist()) <= {-1}
        assert out_TKD.tolist() == want_home(case, rank, torch.float32)
        assert exact.expert_load() == (tuple(work.counts_per_slot.tolist()),)
        assert sum(exact.expert_load()[0]) == len(pairs)
        assert exact.num_rows_sent == rows_that_left(case, rank)


@pytest.mark.parametrize("num_rows", [0, 3])
def test_frames_cost_what_they_are_said_to_cost(num_rows, run_ranks):
    """Whatever is in them; and two collectives where the exact exchange has three."""
    capacity, width, out_width = Capacity(4, 7), 24, 10

    def main(comm):
        exact = Exchange(comm, [[(0, 0), (1, 0), (2, 0)]])
        exchange = PaddedExchange(exact, capacity)
        expert_TK = torch.tensor([[0, 1]] * num_rows, dtype=torch.int64).view(num_rows, 2)
        calls = count_calls(comm)
        work, ticket = exchange.dispatch(0, torch.zeros(num_rows, width, dtype=torch.uint8), expert_TK)
        exchange.combine(torch.zeros(len(work.slot_M), out_width, dtype=torch.bfloat16), ticket)
        assert exact.num_bytes_sent == 0, "a graph that is replayed cannot count on the host"
        return exchange.num_bytes_sent, exact.num_rows_sent, calls

    results = run_ranks(thread_world(3, DEADLINE_S), main)
    layer = EvenLayer(num_rows, num_ranks=3, top_k=2, row_bytes=width, out_bytes=2 * out_width)
    said = layer.padded(capacity)
    assert said == LayerBytes(2 * 4 * (24 + 3 * 4), 2 * 7 * 20)
    assert [num_bytes for num_bytes, _, _ in results] == [said.total] * 3
    assert [num_rows_sent for _, num_rows_sent, _ in results] == [num_rows, num_rows, 2 * num_rows]
    assert [calls for _, _, calls in results] == [["all_to_all_rows"] * 2] * 3


def count_calls(comm):
    """Names of the collectives that `comm` is asked for from now on."""
    calls, swap = [], comm._swap

    def noted(x_NB, send, recv, call):
        calls.append(call)
        return swap(x_NB, send, recv, call)

    comm._swap = noted
    return calls


def test_room_is_for_an_even_load_with_its_chance_and_never_more_than_can_come():
    rule = CapacityRule(factor=1.0, top_k=8, largest_share=24 / 384)  # K2 on 16 ranks
    assert rule.capacity(1) == Capacity(1, 8), "nothing can overflow"
    assert rule.capacity(64) == Capacity(61, 70), "expected: 25.8 rows and 32 pairs"
    hotter = CapacityRule(factor=2.0, top_k=8, largest_share=24 / 384)
    assert hotter.capacity(64) == Capacity(64, 115)
    for num_rows in range(1, 600):
        room = rule.capacity(num_rows)
        assert 1 <= room.rows <= num_rows
        assert room.rows <= room.pairs <= 8 * num_rows
    assert CapacityRule(factor=1.0, top_k=3, largest_share=1.0).capacity(50) == Capacity(50, 150)


def test_an_even_router_sends_about_what_is_said(run_ranks):
    """100 rows of each of four ranks, many times; exact, and with outputs summed where they are computed."""
    num_rows, top_k, width, out_width = 100, 3, 50, 20

    def main(comm):
        exchange = Exchange(comm, [[(expert // 3, expert % 3) for expert in range(12)]])
        generator = torch.Generator().manual_seed(comm.rank)
        for _ in range(20):
            expert_TK = torch.rand(num_rows, 12, generator=generator).topk(top_k).indices
            work, ticket = exchange.dispatch(0, torch.zeros(num_rows, width, dtype=torch.uint8), expert_TK)
            exchange.combine(torch.zeros(len(work.slot_M), out_width, dtype=torch.uint8), ticket)
        return exchange.num_bytes_sent / 20, exchange.num_rows_sent / 20

    layer = EvenLayer(num_rows, num_ranks=4, top_k=top_k, row_bytes=width, out_bytes=out_width)
    for num_bytes, num_rows_sent in run_ranks(thread_world(4, DEADLINE_S), main):
        assert num_bytes == pytest.approx(layer.exact().total, rel=0.05)
        away = num_rows_sent * (width + top_k * 8 + out_width)
        assert away == pytest.approx(layer.pre_reduced().total, rel=0.1), "no expert is chosen twice"


def test_an_even_router_does_not_overflow():
    """64 rows of a rank to 16 ranks, two thousand times: at most e^-16 of frames may."""
    generator = torch.Generator().manual_seed(3)
    capacity = CapacityRule(factor=1.0, top_k=8, largest_share=1 / 16).capacity(64)
    for _ in range(20):
        chosen_NTE = torch.rand(100, 64, 384, generator=generator)
        rank_NTK = chosen_NTE.topk(8, dim=-1).indices // 24
        hits_NTR = torch.nn.functional.one_hot(rank_NTK, 16).sum(2)
        assert int((hits_NTR > 0).sum(1).max()) <= capacity.rows
        assert int(hits_NTR.sum(1).max()) <= capacity.pairs


class Loop(Alone):
    """Rank 0 of four, which gets back what it sends: enough for shapes."""

    size = 4

    def all_to_all_rows(self, x_ND, send, recv):
        assert (len(send), sum(send)) == (4, len(x_ND))
        assert send == recv, "splits that do not depend on the rows"
        return x_ND.clone()


@pytest.mark.parametrize("num_rows", [0, 5])
def test_nothing_in_frames_waits_for_the_device(num_rows):
    """Tensors without values: whoever asks for one, or for a shape that depends on one, is refused."""

    def exchanged(make):
        exchange = make(Exchange(Loop(), [[(expert // 3, expert % 3) for expert in range(12)]]))
        expert_TK = torch.zeros(num_rows, 3, dtype=torch.int64)
        work, ticket = exchange.dispatch(0, torch.zeros(num_rows, WIDTH, dtype=torch.uint8), expert_TK)
        return exchange.combine(torch.zeros(len(work.slot_M), 7, dtype=torch.bfloat16), ticket)

    with FakeTensorMode():
        out_TKD = exchanged(lambda exact: PaddedExchange(exact, Capacity(5, 9)))
        assert out_TKD.shape == (num_rows, 3, 7)
        with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
            exchanged(lambda exact: exact)
