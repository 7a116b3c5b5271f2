"""Whatever the limits, the pages, the company and the accidents: the tokens are those of a sequence alone."""

from hypothesis import given, settings
from hypothesis import strategies as st

from k2dist.errors import RequestError
from k2dist.messages import FinishReason, Request, Sampling
from k2dist.scheduler import Limits

MAX_POSITIONS = 40


@st.composite
def some_limits(draw: st.DrawFn) -> Limits:
    max_running = draw(st.integers(1, 5))
    step_tokens = draw(st.integers(max_running, 24))
    return Limits(
        step_tokens=step_tokens,
        chunk_tokens=draw(st.integers(1, step_tokens)),
        max_running=max_running,
        max_waiting=64,
    )


@st.composite
def some_request(draw: st.DrawFn, name: str) -> Request:
    return Request(
        request_id=name,
        prompt=tuple(draw(st.lists(st.integers(1, 11), min_size=1, max_size=14))),
        num_outputs=draw(st.integers(1, 3)),
        priority=draw(st.integers(0, 1)),
        sampling=Sampling(
            seed=draw(st.integers(0, 255)),
            max_tokens=draw(st.integers(1, 16)),
            min_tokens=draw(st.integers(0, 4)),
            ignore_eos=draw(st.booleans()),
            stop=draw(st.sampled_from([(), ("ab",), ("cc", "d"), ("fg", "ffgg", "k")])),
            stop_token_ids=draw(st.sampled_from([(), (5,), (7, 9)])),
        ),
    )


requests = st.integers(1, 6).flatmap(lambda n: st.tuples(*(some_request(f"r{i}") for i in range(n))))
# What happens, in order: a new request, a step (without prefill, too), an accident.
moments = st.lists(
    st.sampled_from(
        ["add", "add", "step", "step", "step", "decode", "abort", "abort in step", "lose pages", "lose all"]
    ),
    max_size=40,
)


@settings(max_examples=250, deadline=None, derandomize=True)
@given(some_limits(), st.integers(3, 14), st.sampled_from([1, 2, 4]), requests, moments, st.data())
def test_tokens_do_not_depend_on_company_or_accidents(
    fake_lane, solo_answer, limits, num_pages, page_tokens, requests, moments, data
):
    lane = fake_lane(limits, num_pages=num_pages, page_tokens=page_tokens, max_positions=MAX_POSITIONS)
    to_add, aborted, added = list(requests), set(), []
    for moment in [*moments, *(["add"] * len(to_add))]:
        if moment == "add" and to_add:
            request = to_add.pop(0)
            full_len = min(len(request.prompt) + request.sampling.max_tokens, MAX_POSITIONS)
            try:
                lane.add(request)
                added.append(request)
            except RequestError:
                assert full_len > num_pages * page_tokens, "refused, though it fits"
            else:
                assert full_len <= num_pages * page_tokens
        elif moment in ("step", "decode"):
            lane.step(prefill=moment == "step")
        elif moment == "lose pages":
            lane.lose_pages()
        elif added:  # an abort; between steps, in a step, or in a step that is lost with all pages
            name = data.draw(st.sampled_from(added)).request_id
            aborted.add(name)
            plan = None if moment == "abort" else lane.plan()
            lane.abort(name)
            if moment == "lose all":
                lane.lose_pages()
            elif plan is not None:
                lane.commit(plan)
    lane.finish()
    for request in added:
        for index in range(request.num_outputs):
            got, alone = lane.answers[request.request_id, index], solo_answer(request, index, MAX_POSITIONS)
            if request.request_id in aborted and got.finish is FinishReason.ABORT:
                assert got.token_ids == alone.token_ids[: len(got.token_ids)]
                assert len(got.token_ids) < len(alone.token_ids)
            else:
                assert got == alone


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


@settings(max_examples=100, deadline=None, derandomize=True)
@given(some_limits(), st.integers(3, 14), requests)
def test_wants_prefill_says_whether_prefill_would_do_more(fake_lane, limits, num_pages, requests):
    lane = fake_lane(limits, num_pages=num_pages, page_tokens=4, max_positions=MAX_POSITIONS)
    for request in requests:
        if len(request.prompt) + request.sampling.max_tokens <= num_pages * 4:
            lane.add(request)
    while lane.scheduler.has_work:
        wanted = lane.scheduler.wants_prefill
        plan, _ = lane.step()
        if not wanted:
            assert all(grant.samples and grant.num_tokens == 1 for grant in plan.grants)
            assert not plan.new
