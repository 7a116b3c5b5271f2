"""The exchange against a twin that looks at every row of every rank in plain loops."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from k2dist.comm import Alone, Exchange, thread_world

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


def check(case, run_ranks, dtype, comms):
    """Dispatch, mark each pair with where it was computed, combine; compare all with the twin."""

    def main(comm):
        exchange = Exchange(comm, [case.homes[comm.rank]])
        work, ticket = exchange.dispatch(0, case.rows(comm.rank, dtype), case.chosen(comm.rank))
        mark_M = torch.full((len(work.row_M), 1), comm.rank)
        out_MD = torch.cat((work.rows_NW[work.row_M].float(), work.slot_M[:, None], mark_M), dim=1)
        return work, exchange.combine(out_MD.to(torch.bfloat16), ticket), exchange

    results = run_ranks(comms, main)
    for rank, (work, out_TKD, exchange) in enumerate(results):
        pairs = arriving_pairs(case, rank)
        assert work.slot_M.tolist() == [slot for slot, _, _ in pairs]
        want_MW = (
            torch.stack([case.rows(source, dtype)[row].float() for _, source, row in pairs]) if pairs else []
        )
        assert work.rows_NW.dtype == dtype
        assert work.rows_NW[work.row_M].float().tolist() == list(map(list, torch.as_tensor(want_MW).tolist()))
        assert len(work.rows_NW) == len({(source, row) for _, source, row in pairs}), "a row came twice"
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


@settings(deadline=None, max_examples=60)
@given(case=cases(max_size=1))
def test_alone_equals_the_twin(case, run_ranks):
    check(case, run_ranks, torch.float32, [Alone()])


NOBODY_HAS_ROWS = Case(2, ((), ()), (((0, 0), (1, 0)),) * 2)
ALL_TO_ONE_RANK = Case(3, (((0, 1, 2), (2, 0, 1)), ((1, 2, 0),)), (((1, 2), (1, 0), (1, 1)),) * 2)
RANK_2_GETS_NOTHING = Case(1, (((0,),), ((1,), (0,)), ((0,),)), (((0, 0), (1, 0), (2, 0)),) * 3)


@pytest.mark.parametrize(
    "case",
    [NOBODY_HAS_ROWS, ALL_TO_ONE_RANK, RANK_2_GETS_NOTHING],
    ids=["no rows", "one rank", "no receiver"],
)
def test_edges(case, run_ranks):
    check(case, run_ranks, torch.bfloat16, thread_world(len(case.homes), DEADLINE_S))


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
