"""What the scheduler promises its callers, one promise to a test."""

import zlib

import pytest
from msgspec import structs

from k2dist.errors import CapacityError, ConfigError, RequestError
from k2dist.messages import Event, FinishReason, Request, Sampling, StepResult, TokenLogprob, Usage
from k2dist.scheduler import Limits

LIMITS = Limits(step_tokens=8, chunk_tokens=4, max_running=4, max_waiting=6)


def request(name: str = "r", prompt: int = 3, **fields) -> Request:
    """Fields of a request or of its sampling; no two names have a prompt that begins alike."""
    own = {
        key: fields.pop(key) for key in ("priority", "num_outputs", "tenant", "timeout_s") if key in fields
    }
    return Request(
        request_id=name,
        prompt=prompt_of(name, prompt),
        sampling=Sampling(**({"max_tokens": 4, "ignore_eos": True} | fields)),
        **own,
    )


def prompt_of(name: str, num_tokens: int) -> tuple[int, ...]:
    """Tokens 1 to 11, for each name others."""
    digits = zlib.crc32(name.encode())
    return tuple(1 + digits // 11 ** (i % 9) % 11 for i in range(num_tokens))


def lane_of(fake_lane, limits: Limits = LIMITS, num_pages: int = 8):
    return fake_lane(limits, num_pages=num_pages, page_tokens=4, max_positions=24)


def speak(lane, *token_ids: int) -> list[Event]:
    """Put words into the model's mouth: one step for each token, for the only sequence there is."""
    events: list[Event] = []
    for token_id in token_ids:
        plan = lane.plan()
        while not plan.grants[0].samples:
            lane.commit()
            plan = lane.plan()
        result = StepResult(
            generation=1,
            step=plan.step,
            seq_ids=(plan.grants[0].seq_id,),
            token_ids=(token_id,),
            logprobs=(TokenLogprob(token_id=token_id, logprob=-1.0),),
        )
        events += lane.scheduler.commit(result, 0.0)
        lane.scheduler.check()
    return events


# -- ends ----------------------------------------------------------------------------------------------------


def test_events_are_deltas_and_the_last_one_has_the_end(fake_lane) -> None:
    lane = lane_of(fake_lane)
    lane.add(request(max_tokens=2))
    first, last = speak(lane, 5, 6)
    assert (first.first_index, first.token_ids, first.finish, first.usage) == (0, (5,), None, None)
    assert (last.first_index, last.token_ids, last.finish) == (1, (6,), FinishReason.LENGTH)
    assert last.usage == Usage(prompt_tokens=3, completion_tokens=2)
    assert last.logprobs == (TokenLogprob(token_id=6, logprob=-1.0),)


@pytest.mark.parametrize(
    ("sampling", "tokens", "finish", "stop_match"),
    [
        ({"ignore_eos": False}, (5, 0), FinishReason.STOP, 0),
        ({"ignore_eos": True}, (5, 0, 0, 0), FinishReason.LENGTH, None),
        ({"stop_token_ids": (6,)}, (5, 6), FinishReason.STOP, 6),
        ({"stop_token_ids": (6,), "min_tokens": 3}, (6, 6, 6), FinishReason.STOP, 6),
        ({"ignore_eos": False, "min_tokens": 3}, (0, 0, 0), FinishReason.STOP, 0),
        ({"stop": ("ab",)}, (1, 1, 2), FinishReason.STOP, "ab"),
        (
            {"stop": ("ab",), "min_tokens": 2},
            (1, 2, 1, 2),
            FinishReason.STOP,
            "ab",
        ),  # the first b comes too late
        ({"stop": ("cd",)}, (3, 4), FinishReason.STOP, "cd"),  # token 3 is "cc"
        (
            {"max_tokens": 100},
            tuple(range(1, 10)) + (1,) * 12,
            FinishReason.LENGTH,
            None,
        ),  # 3 + 21 = 24 positions
        (
            {"stop_token_ids": (6,), "max_tokens": 2},
            (5, 6),
            FinishReason.STOP,
            6,
        ),  # both at once: the stop is said
    ],
)
def test_an_output_ends_where_it_must_and_says_why(fake_lane, sampling, tokens, finish, stop_match) -> None:
    lane = lane_of(fake_lane)
    lane.add(request(**sampling))
    events = speak(lane, *tokens)
    assert [event.finish for event in events[:-1]] == [None] * (len(tokens) - 1)
    assert (events[-1].finish, events[-1].stop_match) == (finish, stop_match)
    assert events[-1].token_ids == tokens[-1:], "the ending token is one of the tokens"
    assert not lane.scheduler.has_work


# -- recovery ------------------------------------------------------------------------------------------------


def test_known_tokens_are_not_said_again(fake_lane) -> None:
    lane = lane_of(fake_lane)
    recovered = Request(
        request_id="r", prompt=(1, 1), sampling=Sampling(stop=("ab",), max_tokens=9), generated={0: (5, 1)}
    )
    assert lane.scheduler.add(recovered, 0.0) == ()
    (event,) = speak(lane, 2)
    assert (event.first_index, event.token_ids) == (2, (2,))
    assert event.stop_match == "ab", "the stop string had begun before"
    assert event.usage == Usage(prompt_tokens=2, completion_tokens=3)


def test_an_output_that_had_ended_ends_at_once_and_the_others_go_on(fake_lane) -> None:
    lane = lane_of(fake_lane)
    recovered = Request(
        request_id="r",
        prompt=(1,),
        num_outputs=2,
        sampling=Sampling(max_tokens=3),
        generated={0: (5, 0), 1: (5,)},
    )
    (event,) = lane.scheduler.add(recovered, 0.0)
    assert (event.output_index, event.first_index, event.token_ids) == (0, 2, ())
    assert (event.finish, event.stop_match) == (FinishReason.STOP, 0)
    events = speak(lane, 6, 7)
    assert [(event.output_index, event.first_index) for event in events] == [(1, 1), (1, 2)]


def test_tokens_after_an_end_are_refused(fake_lane) -> None:
    recovered = Request(request_id="r", prompt=(1,), sampling=Sampling(), generated={0: (5, 0, 6)})
    with pytest.raises(RequestError, match="generated: output 0 goes on after its end at token 1"):
        lane_of(fake_lane).scheduler.add(recovered, 0.0)


# -- refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (request(prompt=0), "prompt: is empty"),
        (request(prompt=24), "prompt: 24 tokens leave no room in a context of 24"),
        (request(max_tokens=0), "max_tokens: 0"),
        (request(num_outputs=0), "num_outputs: 0: use 1 to 6"),
        (request(num_outputs=7), "num_outputs: 7: use 1 to 6"),
        (
            request(prompt=6, max_tokens=7),
            r"max_tokens: 6 prompt tokens \+ 7 to generate = 13 tokens need 4 pages of 4",
        ),
        (
            request(prompt=13, max_tokens=99),
            r"prompt: 13 prompt tokens \+ 11 to generate = 24 tokens need 6 pages of 4",
        ),
        (request(stop=("",)), "stop: an empty string"),
        (request(priority=2**31), "priority: 2147483648: use -2147483647 to 2147483647"),
        (request(timeout_s=0.0), "timeout_s: 0.0: use a number of seconds"),
        (request(timeout_s=float("nan")), "timeout_s: nan: use"),
        (
            Request(request_id="r", prompt=(1,), sampling=Sampling(), generated={1: (5,)}),
            "generated: output 1",
        ),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_alone(fake_lane, wrong: Request, message: str) -> None:
    lane = lane_of(fake_lane, num_pages=3)
    lane.add(request("other"))
    with pytest.raises(RequestError, match=message):
        lane.scheduler.add(wrong, 0.0)
    lane.finish()
    assert lane.answers["other", 0].finish is FinishReason.LENGTH


def test_an_id_in_use_is_refused_until_its_request_has_ended(fake_lane) -> None:
    lane = lane_of(fake_lane)
    lane.add(request())
    with pytest.raises(RequestError, match="request_id: 'r' is in use"):
        lane.add(request())
    lane.finish()
    lane.add(request())


def test_a_full_queue_is_a_matter_of_time(fake_lane) -> None:
    lane = lane_of(fake_lane)
    lane.add(request("many", num_outputs=5))
    with pytest.raises(CapacityError, match="max_waiting=6"):
        lane.add(request("more", num_outputs=2))
    lane.step()
    lane.add(request("more", num_outputs=2))
    lane.finish()


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"step_tokens": 4, "max_running": 5}, "scheduler.step_tokens=4: less than max_running=5"),
        ({"step_tokens": 512, "chunk_tokens": 513}, "scheduler.chunk_tokens=513: more than step_tokens=512"),
        ({"max_running": 0}, "scheduler.max_running=0: must be at least 1"),
        ({"ageing_s": 0.0}, r"scheduler.ageing_s=0.0: use a number of seconds"),
        ({"ageing_s": float("inf")}, r"scheduler.ageing_s=inf: use"),
    ],
)
def test_limits_that_contradict_each_other_are_refused(limits: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Limits(**limits)


# -- steps ---------------------------------------------------------------------------------------------------


def test_decodes_come_before_prompts_and_the_budget_is_kept(fake_lane) -> None:
    lane = lane_of(fake_lane, Limits(step_tokens=5, chunk_tokens=4, max_running=4, max_waiting=9))
    for name in "abc":
        lane.add(request(name, prompt=1))
    lane.step()
    lane.add(request("long", prompt=9))
    plan, _ = lane.step()
    assert [grant.num_tokens for grant in plan.grants] == [1, 1, 1, 2]


def test_nobody_overtakes_the_one_that_waits_for_pages(fake_lane) -> None:
    lane = lane_of(fake_lane, num_pages=4)
    lane.add(request("running", prompt=7, max_tokens=5))
    lane.step()
    lane.add(request("large", prompt=8, max_tokens=4))
    lane.add(request("small", prompt=1, max_tokens=1))
    plan, _ = lane.step()
    assert not plan.new
    lane.finish()
    assert [new.request_id for plan in lane.plans for new in plan.new] == ["running", "large", "small"]


def test_prompts_admitted_together_do_not_preempt_each_other(fake_lane) -> None:
    lane = lane_of(fake_lane, num_pages=6)
    for name in "abc":
        lane.add(request(name, prompt=11, max_tokens=1))
    lane.finish()
    assert len([new for plan in lane.plans for new in plan.new]) == 3, "somebody had to start again"


def test_the_last_one_waits_with_its_pages_rather_than_start_again(fake_lane) -> None:
    lane = lane_of(fake_lane, num_pages=3)
    lane.add(request("first", prompt=5, max_tokens=3))
    lane.add(request("last", prompt=3, max_tokens=4))
    lane.finish()
    assert len([new for plan in lane.plans for new in plan.new]) == 2
    without = [plan.step for plan in lane.plans if [grant.seq_id for grant in plan.grants] == [0]]
    assert without == [2, 3], "position 4 of `last` wants a second page, and `first` has two of three"


def test_an_idle_lane_plans_nothing_and_need_not_commit_it(fake_lane) -> None:
    lane = lane_of(fake_lane)
    assert not lane.plan().grants
    assert not lane.plan().grants
    lane.add(request())
    lane.step()


def test_a_plan_may_be_one_step_ahead_and_no_more(fake_lane) -> None:
    lane = lane_of(fake_lane)
    lane.add(request())
    first, second = lane.plan(), lane.plan()
    grants = (*first.grants, *second.grants)
    assert [(grant.start, grant.samples) for grant in grants] == [(0, True), (3, True)]
    with pytest.raises(AssertionError, match="not committed"):
        lane.plan()


def test_nothing_is_planned_behind_the_last_token(fake_lane) -> None:
    lane = lane_of(fake_lane)
    lane.add(request("short", max_tokens=1))
    lane.add(request("long"))
    lane.plan()
    assert [grant.seq_id for grant in lane.plan().grants] == [1]
    lane.finish()
    assert [len(lane.answers[name, 0].token_ids) for name in ("short", "long")] == [1, 4]


def test_a_row_behind_an_end_is_discarded(fake_lane) -> None:
    lane = lane_of(fake_lane)
    lane.add(request(prompt=3, max_tokens=9, stop_token_ids=tuple(range(12))))
    first, _ = lane.plan(), lane.plan()
    (event,) = lane.commit()
    assert event.finish is FinishReason.STOP
    assert (lane.scheduler.has_work, lane.scheduler.load(0).num_pages_free) == (False, 8)
    assert lane.commit() == ()
    assert lane.plan().released == (first.grants[0].seq_id,)


def test_a_result_of_another_step_is_not_taken(fake_lane) -> None:
    lane = lane_of(fake_lane)
    lane.add(request())
    plan = lane.plan()
    result = lane.rank.run(plan)
    for stale in ({"step": 7}, {"generation": 2}, {"seq_ids": (), "token_ids": (), "logprobs": ()}):
        fields = {name: getattr(result, name) for name in result.__struct_fields__}
        with pytest.raises(AssertionError):
            lane.scheduler.commit(StepResult(**(fields | stale)), 0.0)
    lane.take(lane.scheduler.commit(result, 0.0))


def test_an_abort_ends_every_output_once_and_unknown_ids_are_left_alone(fake_lane) -> None:
    lane = lane_of(fake_lane)
    lane.add(request(num_outputs=3))
    lane.step()
    events = lane.scheduler.abort("r")
    assert [(event.output_index, event.finish) for event in events] == [
        (i, FinishReason.ABORT) for i in range(3)
    ]
    assert lane.scheduler.abort("r") == ()
    assert lane.scheduler.abort("nobody") == ()
    assert not lane.scheduler.has_work
    assert lane.scheduler.load(0).num_pages_free == 8
    assert set(lane.plan().released) == {0, 1, 2}


# -- deadlines -----------------------------------------------------------------------------------------------


def test_a_request_ends_when_its_time_is_up_and_says_so(fake_lane) -> None:
    lane = lane_of(fake_lane)
    lane.now_s = 100.0
    lane.add(request("r", max_tokens=9, num_outputs=2, timeout_s=5.0))
    lane.add(request("other", max_tokens=9))
    lane.step()
    lane.now_s = 104.9
    lane.step()
    lane.now_s = 105.0
    lane.plan()
    events = lane.commit()
    ends = [event for event in events if event.finish]
    assert [(event.request_id, event.output_index, event.finish) for event in ends] == [
        ("r", 0, FinishReason.TIMEOUT),
        ("r", 1, FinishReason.TIMEOUT),
    ]
    assert ends[0].error == "its timeout_s=5 has passed; allow more, or ask less"
    assert [len(lane.answers["r", index].token_ids) for index in (0, 1)] == [3, 3], "the last step counts"
    lane.finish()
    assert lane.answers["other", 0].finish is FinishReason.LENGTH


def test_time_runs_out_also_while_no_step_comes(fake_lane) -> None:
    lane = lane_of(fake_lane)
    lane.add(request("waits", timeout_s=1.0))
    assert lane.scheduler.expire(0.9) == ()
    (event,) = lane.scheduler.expire(1.0)
    assert (event.finish, event.token_ids) == (FinishReason.TIMEOUT, ())
    assert lane.scheduler.expire(1.0) == ()
    assert not lane.scheduler.has_work


def test_an_abort_has_no_error(fake_lane) -> None:
    lane = lane_of(fake_lane)
    lane.add(request("r", timeout_s=1.0))
    (event,) = lane.scheduler.abort("r")
    assert (event.finish, event.error) == (FinishReason.ABORT, "")


# -- load ----------------------------------------------------------------------------------------------------


def test_the_load_tells_a_router_what_waits_and_what_is_cached(fake_lane) -> None:
    lane = lane_of(fake_lane, structs.replace(LIMITS, max_running=1))
    lane.add(request("runs", prompt=9, max_tokens=1))
    lane.add(request("waits", prompt=6, num_outputs=2))
    while lane.scheduler.load(0).num_running or not lane.plans:
        lane.step()
    load = lane.scheduler.load(0)
    assert (load.num_waiting, load.num_tokens_waiting) == (2, 12)
    assert (load.num_pages, load.num_pages_free, load.num_pages_cached) == (8, 8, 2)
