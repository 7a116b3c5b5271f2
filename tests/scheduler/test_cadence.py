"""Prompts wait for their step while somebody decodes, and for nobody else."""

import pytest

from k2dist.scheduler import PrefillCadence


def steps(every: int, *wanted: str) -> str:
    """What each step computes of what is `wanted`: p(rompts) if they may be, d(ecodes), - nothing."""
    cadence, done = PrefillCadence(every), ""
    for kinds in wanted:
        computed = "".join(kind for kind in kinds if kind == "d" or cadence.allows_prefill) or "-"
        cadence.note(has_prompts="p" in computed, has_decodes="d" in computed)
        done += computed + " "
    return done.strip()


def test_every_step_may_compute_prompts_by_default() -> None:
    assert steps(1, "pd", "p", "pd", "d", "pd") == "pd p pd d pd"


def test_decodes_have_the_steps_between_to_themselves() -> None:
    assert steps(2, *["pd"] * 6) == "pd d pd d pd d"
    assert steps(3, *["pd"] * 6) == "pd d d pd d d"


def test_prompts_do_not_wait_while_nobody_decodes() -> None:
    assert steps(3, "p", "p", "pd", "pd", "pd") == "p p pd d d"
    assert steps(3, "pd", "d", "d", "d", "pd", "d") == "pd d d d pd d"


@pytest.mark.parametrize("every", [1, 2, 5])
def test_no_prompt_waits_longer_than_that(every: int) -> None:
    done = steps(every, *["pd"] * 20).split()
    assert all("pd" in done[i : i + every] for i in range(20 - every))
