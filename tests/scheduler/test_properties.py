"""Whatever the limits, the pages, the company and the accidents: the tokens are those of a sequence alone."""

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k2dist.errors import CapacityError, RequestError
from k2dist.messages import FinishReason, Request, Sampling
from k2dist.scheduler import Limits

MAX_POSITIONS = 40
STOPS = [(), ("ab",), ("cc", "d"), ("fg", "ffgg", "k")]
# Prompts begin alike, so that prefixes are found; and differ somewhere, so that wrong ones would show.
COMMON = (3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8)


@st.composite
def some_limits(draw: st.DrawFn) -> Limits:
    max_running = draw(st.integers(1, 5))
    step_tokens = draw(st.integers(max_running, 24))
    return Limits(
        step_tokens=step_tokens,
        chunk_tokens=draw(st.integers(1, step_tokens)),
        max_running=max_running,
        max_waiting=64,
        ageing_s=draw(st.sampled_from([1, 60])),
        reuse_generated=draw(st.booleans()),
    )


@st.composite
def some_request(draw: st.DrawFn, name: str) -> Request:
    common = COMMON[: draw(st.integers(0, len(COMMON)))]
    return Request(
        request_id=name,
        prompt=common + tuple(draw(st.lists(st.integers(1, 11), min_size=not common, max_size=6))),
        num_outputs=draw(st.integers(1, 3)),
        priority=draw(st.integers(-1, 1)),
        tenant=draw(st.sampled_from(["", "b"])),
        timeout_s=draw(st.sampled_from([None, None, None, 3.0])),
        sampling=Sampling(
            seed=draw(st.integers(0, 255)),
            max_tokens=draw(st.integers(1, 16)),
            min_tokens=draw(st.integers(0, 4)),
            ignore_eos=draw(st.booleans()),
            stop=draw(st.sampled_from(STOPS)),
            stop_token_ids=draw(st.sampled_from([(), (5,), (7, 9)])),
            prompt_logprobs=draw(st.sampled_from([None, None, 1])),
        ),
    )


requests = st.integers(1, 6).flatmap(lambda n: st.tuples(*(some_request(f"r{i}") for i in range(n))))
# What happens, in order: a new request, a step (without prefill, too), an accident.
moments = st.lists(
    st.sampled_from(
        [
            *("add", "add", "step", "step", "step", "decode", "wait", "plan", "plan", "commit"),
            *("abort", "abort in step", "spoil", "lose pages", "lose all"),
        ]
    ),
    max_size=40,
)


@settings(max_examples=250, deadline=None, derandomize=True)
@given(some_limits(), st.integers(3, 14), st.sampled_from([1, 2, 4]), requests, moments, st.data())
def test_tokens_do_not_depend_on_company_or_accidents(
    fake_lane, solo_answer, limits, num_pages, page_tokens, requests, moments, data
):
    lane = fake_lane(limits, num_pages=num_pages, page_tokens=page_tokens, max_positions=MAX_POSITIONS)
    to_add, cut_off, added = list(requests), set(), []
    for moment in [*moments, *(["add"] * len(to_add))]:
        if moment == "add" and to_add:
            request = to_add.pop(0)
            full_len = min(len(request.prompt) + request.sampling.max_tokens, MAX_POSITIONS)
            found = lane.scheduler.cached_prefix_len(request.prompt, request.tenant)
            assert found == lane.hits(request.prompt, request.tenant)
            try:
                lane.add(request)
                added.append(request)
            except RequestError:
                assert full_len > num_pages * page_tokens, "refused, though it fits"
            else:
                assert full_len <= num_pages * page_tokens
        elif moment in ("step", "decode"):
            if lane.num_flying == 2:
                lane.commit()
            lane.step(prefill=moment == "step")
        elif moment == "plan":
            if lane.num_flying < 2:
                lane.plan()
        elif moment == "commit":
            if lane.num_flying:
                lane.commit()
        elif moment == "wait":
            lane.now_s += 1
        elif moment == "lose pages":
            lane.lose_pages()
        elif added:  # an abort; between steps, in a step, or in a step that is lost with all pages
            name = data.draw(st.sampled_from(added)).request_id
            cut_off.add(name)
            if moment != "abort" and lane.num_flying < 2:
                lane.plan()
            lane.abort(name, is_spoiled=moment == "spoil")
            if moment == "lose all":
                lane.lose_pages()
            elif lane.num_flying:
                lane.commit()
    lane.finish()
    for request in added:
        check_answers(lane, request, solo_answer, may_be_cut=request.request_id in cut_off)


def check_answers(lane, request: Request, solo_answer, *, may_be_cut: bool) -> None:
    """All outputs are what they are alone; one that was cut off, or ran out of time, its beginning."""
    for index in range(request.num_outputs):
        got, alone = lane.answers[request.request_id, index], solo_answer(request, index, MAX_POSITIONS)
        if got.finish in (FinishReason.ABORT, FinishReason.TIMEOUT):
            assert may_be_cut if got.finish is FinishReason.ABORT else "timeout_s" in got.error
            assert request.timeout_s is not None or not got.error
            assert got.token_ids == alone.token_ids[: len(got.token_ids)]
            assert len(got.token_ids) < len(alone.token_ids)
        else:
            assert got == alone
        if request.sampling.prompt_logprobs is not None and index == 0 and got.token_ids:
            assert [score.token_id for score in got.prompt_logprobs] == list(request.prompt[1:])
        else:
            assert index == 0 or not got.prompt_logprobs


@settings(max_examples=100, deadline=None, derandomize=True)
@given(some_limits(), some_limits(), requests, st.integers(0, 30))
def test_another_lane_goes_on_where_the_first_one_stopped(
    fake_lane, solo_answer, before, after, requests, num_steps
):
    first = fake_lane(before, num_pages=20, page_tokens=2, max_positions=MAX_POSITIONS)
    for request in requests:
        first.add(request)
    for _ in range(num_steps):
        first.step()
    second = fake_lane(after, num_pages=10, page_tokens=4, max_positions=MAX_POSITIONS)
    for request in first.scheduler.live():
        second.add(request)
    second.finish()
    answers = first.answers | second.answers
    for request in requests:
        for index in range(request.num_outputs):
            assert answers[request.request_id, index] == solo_answer(request, index, MAX_POSITIONS)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(some_limits(), st.integers(8, 14), requests)
def test_equal_histories_give_equal_plans(fake_lane, limits, num_pages, requests):
    lanes = [
        fake_lane(limits, num_pages=num_pages, page_tokens=4, max_positions=MAX_POSITIONS) for _ in range(2)
    ]
    for lane in lanes:
        for request in requests:
            lane.add(request)
            lane.step()
        lane.finish()
    assert lanes[0].plans == lanes[1].plans


def long_request(rng: Random, number: int) -> Request:
    """Of one of four conversations, each a tree of prompts that begin alike."""
    common = tuple(1 + (token * 7 + rng.randrange(4)) % 11 for token in COMMON[:1]) + COMMON[1:]
    prompt = common[: rng.randint(1, 12)] + tuple(rng.randint(1, 11) for _ in range(rng.randint(0, 6)))
    return Request(
        request_id=f"r{number}",
        prompt=prompt,
        num_outputs=rng.choice([1, 1, 1, 2]),
        priority=rng.choice([0, 0, 0, 1, 5]),
        tenant=rng.choice(["", "b", "c"]),
        timeout_s=rng.choice([None, None, None, 4.0]),
        sampling=Sampling(
            seed=rng.randrange(256),
            max_tokens=rng.randint(1, 16),
            ignore_eos=rng.random() < 0.5,
            stop=rng.choice(STOPS),
            prompt_logprobs=rng.choice([None, None, None, 0]),
        ),
    )


@pytest.mark.parametrize("is_ahead", [False, True])
@pytest.mark.parametrize("reuse_generated", [False, True])
@pytest.mark.parametrize("num_pages", [11, 30])
def test_a_lane_that_is_never_idle_stays_right(
    fake_lane, solo_answer, num_pages, reuse_generated, is_ahead
) -> None:
    """Three thousand events each, short of pages or not: nobody waits for ever, and all of it comes true."""
    rng = Random(num_pages)
    limits = Limits(
        step_tokens=16,
        chunk_tokens=6,
        max_running=5,
        max_waiting=12,
        reuse_generated=reuse_generated,
        ageing_s=5,
    )
    lane = fake_lane(limits, num_pages=num_pages, page_tokens=4, max_positions=MAX_POSITIONS)
    asked, cut_off, arrived_s = [], set(), {}
    for number in range(3000):
        event = rng.choices(["add", "step", "decode", "abort", "lose"], [40, 50, 6, 2, 0.3])[0]
        lane.now_s += 0.1
        if event == "add":
            request = long_request(rng, number)
            try:
                lane.add(request)
            except CapacityError:
                continue  # the queue is full, as it should be most of the time
            asked.append(request)
            arrived_s[request.request_id] = lane.now_s
        elif event == "abort" and lane.scheduler.has_work:
            name = rng.choice(lane.scheduler.live()).request_id
            cut_off.add(name)
            lane.abort(name)
        elif event == "lose":
            lane.lose_pages()
        else:
            if is_ahead and not lane.num_flying:
                lane.plan()
            plan, _ = lane.step(prefill=event != "decode")
            if not plan.grants and lane.num_flying:
                lane.commit()  # nothing to do before it
        for live in lane.scheduler.live():
            waited_s = lane.now_s - arrived_s[live.request_id]
            assert waited_s < 60, f"{live.request_id} of priority {live.priority} waits for ever"
    lane.finish()
    for request in asked:
        check_answers(lane, request, solo_answer, may_be_cut=request.request_id in cut_off)
    assert sum(answer.cached_tokens > 0 for answer in lane.answers.values()) > len(asked) / 10
    starts = [new.seq_id for plan in lane.plans for new in plan.new]
    assert len(starts) - len(set(starts)) > 10, "nobody had to start again"
    assert sum(bool(answer.error) for answer in lane.answers.values()) > 10, "nobody ran out of time"
