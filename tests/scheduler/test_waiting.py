"""Whose turn it is: the fast order against its definition, and what the definition promises."""

from hypothesis import given, settings
from hypothesis import strategies as st

from k2dist.ids import RequestId, SeqId
from k2dist.messages import Request, Sampling
from k2dist.scheduler.policy import rank
from k2dist.scheduler.sequence import EndRules, Sequence
from k2dist.scheduler.waiting import Waiting

AGEING_S = 10.0
RULES = EndRules(frozenset(), lambda token_id: b"", 100)


def sequence(number: int, tenant: str = "", priority: int = 0, arrival_s: float = 0.0) -> Sequence:
    request = Request(
        request_id=RequestId(str(number)), prompt=(1,), sampling=Sampling(), tenant=tenant, priority=priority
    )
    place = rank(arrival_s, priority, number, AGEING_S)
    return Sequence.begin(SeqId(number), request, 0, place, RULES)


class SlowTwin:
    """Looks at everybody, each time."""

    def __init__(self) -> None:
        self.seqs: list[Sequence] = []
        self.since: dict[str, tuple[float, int]] = {}
        self.turn = 0

    def add(self, seq: Sequence, since_s: float) -> None:
        tenant = seq.request.tenant
        if not any(other.request.tenant == tenant for other in self.seqs):
            self.since[tenant] = (since_s, self.next_turn())
        self.seqs.append(seq)

    def take_turn(self, now_s: float) -> Sequence:
        heads = {}
        for seq in sorted(self.seqs, key=lambda seq: seq.rank):
            heads.setdefault(seq.request.tenant, seq)

        def waited(seq: Sequence) -> tuple[float, int]:
            since_s, turn = self.since[seq.request.tenant]
            return (since_s - seq.request.priority * AGEING_S, turn)

        first = min(heads.values(), key=waited)
        self.since[first.request.tenant] = (now_s, self.next_turn())
        self.seqs.remove(first)
        return first

    def next_turn(self) -> int:
        self.turn += 1
        return self.turn


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["add", "add", "add", "take", "take", "remove", "return", "wait"]),
            st.integers(0, 3),
            st.integers(-1, 2),
        ),
        max_size=60,
    )
)
def test_the_order_is_that_of_whoever_looks_at_everybody(actions: list[tuple[str, int, int]]) -> None:
    waiting, twin, now_s, taken = Waiting(AGEING_S), SlowTwin(), 0.0, []
    for number, (action, which, priority) in enumerate(actions):
        if action == "add":
            seq = sequence(number, "abcd"[which], priority, now_s)
            waiting.add(seq, now_s)
            twin.add(seq, now_s)
        elif action == "take" and twin.seqs:
            first = waiting.first()
            taken.append((waiting.take_turn(now_s), now_s))
            assert taken[-1][0] is first is twin.take_turn(now_s)
        elif action == "remove" and twin.seqs:
            seq = twin.seqs.pop(which % len(twin.seqs))
            waiting.remove(seq)
        elif action == "return" and taken:  # it was preempted
            seq, since_s = taken.pop(which % len(taken))
            waiting.add(seq, since_s)
            twin.add(seq, since_s)
        elif action == "wait":
            now_s += which * 4
        waiting.check()
        assert sorted(waiting.ids()) == sorted(seq.id for seq in twin.seqs)
        assert (len(waiting), waiting.num_tokens) == (len(twin.seqs), len(twin.seqs))


def test_a_tenant_with_a_thousand_sequences_is_behind_itself() -> None:
    waiting = Waiting(AGEING_S)
    for number in range(1000):
        waiting.add(sequence(number, "many"), 0.0)
    for number in range(1000, 1003):
        waiting.add(sequence(number, "few"), 0.0)
    assert [waiting.take_turn(0.0).request.tenant for _ in range(8)] == ["many", "few"] * 3 + ["many"] * 2


def test_nobody_is_behind_a_stream_of_higher_priority_for_ever() -> None:
    """A sequence a second, each three priorities above the one that waits: after 30 s the older one goes."""
    for rival in ("same", "other"):
        waiting = Waiting(AGEING_S)
        low = sequence(0, "same", 0, 0.0)
        waiting.add(low, 0.0)
        for now_s in range(1, 100):
            waiting.add(sequence(now_s, rival, 3, float(now_s)), float(now_s))
            if waiting.take_turn(float(now_s)) is low:
                break
        assert now_s == 30


def test_who_comes_back_keeps_its_place_among_its_tenants_own() -> None:
    waiting = Waiting(AGEING_S)
    for number in range(3):
        waiting.add(sequence(number), 0.0)
    first = waiting.take_turn(1.0)
    waiting.add(first, 1.0)
    assert waiting.take_turn(2.0) is first
