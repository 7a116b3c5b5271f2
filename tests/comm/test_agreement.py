import itertools

import pytest

from k2dist.comm import Alone, StepAgreement, agree, combine, thread_world
from k2dist.errors import PeerError
from k2dist.ids import Generation

IDLE = StepAgreement(generation=Generation(3), step=7, num_rows=0, is_idle=True, is_stopping=False)


def word(**changes):
    return StepAgreement(**{name: getattr(IDLE, name) for name in IDLE.__struct_fields__} | changes)


def test_one_rank_agrees_with_itself():
    for mine in (
        IDLE,
        word(num_rows=5, is_idle=False, is_stopping=True, has_prompts=True, has_decodes=True),
    ):
        assert combine([mine]) == mine
        assert agree(Alone(), mine) == mine


def test_any_and_all():
    busy = word(num_rows=5, is_idle=False)
    assert combine([IDLE, busy, word(num_rows=3)]) == busy
    assert combine([IDLE, IDLE]) == IDLE
    for name in ("is_stopping", "has_prompts", "has_decodes"):
        for said in itertools.product((False, True), repeat=3):
            assert getattr(combine([word(**{name: yes}) for yes in said]), name) == any(said)
    for said in itertools.product((False, True), repeat=3):
        assert combine([word(is_idle=yes) for yes in said]).is_idle == all(said)


@pytest.mark.parametrize("astray", [{"step": 8}, {"generation": Generation(2)}])
def test_a_rank_at_another_step_is_named(astray):
    with pytest.raises(PeerError, match=r"rank 1 is at generation . step .; most are at") as caught:
        combine([IDLE, word(**astray), IDLE])
    assert caught.value.ranks == (1,)


def test_of_two_that_differ_the_lower_rank_is_right():
    with pytest.raises(PeerError) as caught:
        combine([IDLE, word(step=6)])
    assert caught.value.ranks == (1,)


def test_all_ranks_learn_the_same(run_ranks):
    words = [word(num_rows=r * 2**40, is_idle=r == 1, has_decodes=r == 2) for r in range(3)]
    agreed = run_ranks(thread_world(3, 20.0), lambda comm: agree(comm, words[comm.rank]))
    assert agreed == [combine(words)] * 3
    assert agreed[0].num_rows == 2 * 2**40
