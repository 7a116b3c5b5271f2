"""Which positions a prompt finds computed: all that is shared and certain, never more."""

import pytest
from msgspec import structs

from k2dist.messages import Request, Sampling
from k2dist.scheduler import Limits

LIMITS = Limits(step_tokens=8, chunk_tokens=4, max_running=4, max_waiting=6)
PROMPT = (1, 2, 3, 4, 5, 6, 7, 8, 9)


def request(name: str = "r", prompt: tuple[int, ...] = PROMPT, *, tenant: str = "", **sampling) -> Request:
    sampling = {"max_tokens": 4, "ignore_eos": True} | sampling
    return Request(request_id=name, prompt=prompt, tenant=tenant, sampling=Sampling(**sampling))


def lane_of(fake_lane, limits: Limits = LIMITS, num_pages: int = 8):
    return fake_lane(limits, num_pages=num_pages, page_tokens=4, max_positions=24)


def cached_tokens(lane, name: str, prompt: tuple[int, ...], **fields) -> int:
    """What the answer says was cached, which must be what its first grant left out."""
    lane.add(request(name, prompt, max_tokens=1, **fields))
    first = len(lane.plans)
    lane.finish()
    grants = [grant for plan in lane.plans[first:] for grant in plan.grants]
    assert lane.answers[name, 0].cached_tokens == grants[0].start
    return grants[0].start


@pytest.mark.parametrize(
    ("prompt", "num_cached"),
    [
        (PROMPT, 8),
        (PROMPT[:8], 4),
        (PROMPT[:5], 4),
        (PROMPT[:4], 0),
        ((1, 2, 3, 9), 0),
        (PROMPT[:4] + (9,) * 5, 4),
    ],
)
def test_a_prompt_begins_behind_what_is_cached_and_its_last_token_is_computed(
    fake_lane, prompt, num_cached
) -> None:
    lane = lane_of(fake_lane)
    assert cached_tokens(lane, "first", PROMPT) == 0
    assert lane.scheduler.cached_prefix_len(prompt, "") == num_cached
    assert cached_tokens(lane, "second", prompt) == num_cached


def test_a_tenant_finds_only_what_is_its_own(fake_lane) -> None:
    lane = lane_of(fake_lane)
    assert cached_tokens(lane, "a", PROMPT, tenant="a") == 0
    assert lane.scheduler.cached_prefix_len(PROMPT, "b") == 0
    assert cached_tokens(lane, "b", PROMPT, tenant="b") == 0
    assert cached_tokens(lane, "a again", PROMPT, tenant="a") == 8


def test_who_asks_for_the_logprobs_of_its_prompt_computes_all_of_it(fake_lane) -> None:
    lane = lane_of(fake_lane)
    assert cached_tokens(lane, "first", PROMPT) == 0
    assert cached_tokens(lane, "scored", PROMPT, prompt_logprobs=0) == 0
    assert [score.token_id for score in lane.answers["scored", 0].prompt_logprobs] == list(PROMPT[1:])
    assert cached_tokens(lane, "third", PROMPT) == 8


def test_a_page_is_shared_only_once_the_step_that_fills_it_is_committed(fake_lane) -> None:
    lane = lane_of(fake_lane)
    lane.add(request())
    lane.step()  # four tokens: a page
    lane.plan()
    assert lane.scheduler.cached_prefix_len(PROMPT, "") == 4
    lane.commit()
    assert lane.scheduler.cached_prefix_len(PROMPT, "") == 8
    lane.step()
    lane.lose_pages()
    assert lane.scheduler.cached_prefix_len(PROMPT, "") == 0
    lane.finish()


def test_what_a_request_computed_when_it_was_ended_is_not_shared(fake_lane) -> None:
    lane = lane_of(fake_lane)
    lane.add(request())
    lane.step()
    lane.plan()
    lane.abort("r")
    lane.commit()
    assert lane.scheduler.cached_prefix_len(PROMPT, "") == 4


def test_after_wrong_numbers_nothing_is_found_again(fake_lane) -> None:
    lane = lane_of(fake_lane)
    for name in ("good", "spoiled"):
        lane.add(request(name))
        lane.step()
        lane.step()
    lane.plan()
    lane.abort("spoiled", is_spoiled=True)
    lane.commit()
    assert lane.scheduler.cached_prefix_len(PROMPT, "") == 0
    assert lane.scheduler.load(0).num_pages_cached == 0
    lane.finish()


@pytest.mark.parametrize(("reuse_generated", "num_cached"), [(False, 8), (True, 12)])
def test_generated_pages_are_found_only_where_the_limits_allow_it(
    fake_lane, reuse_generated, num_cached
) -> None:
    lane = lane_of(fake_lane, structs.replace(LIMITS, reuse_generated=reuse_generated))
    lane.add(request(max_tokens=6))
    lane.finish()
    turn = PROMPT + tuple(lane.answers["r", 0].token_ids)
    assert cached_tokens(lane, "next", turn) == num_cached


def test_what_a_preempted_sequence_finds_again_does_not_count_as_cached(fake_lane) -> None:
    lane = lane_of(fake_lane, num_pages=4)
    lane.add(request("old", (1,) * 7, max_tokens=5))
    lane.add(request("young", (2,) * 6, max_tokens=7))
    lane.finish()
    starts = [new for plan in lane.plans for new in plan.new if new.request_id == "young"]
    assert len(starts) == 2
    assert lane.answers["young", 0].cached_tokens == 0
