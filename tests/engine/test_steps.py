"""The next step is planned and agreed on while this one computes, and what it needs of this one arrives."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from k2dist.comm import StepAgreement
from k2dist.config import read_architecture
from k2dist.engine import LocalWorld
from k2dist.engine.device_thread import DeviceThread
from k2dist.engine.follow import Follow
from k2dist.engine.forward import ForwardPass, Hidden, StagedBatch
from k2dist.engine.lane import LanePort
from k2dist.engine.local import Generated
from k2dist.engine.steps import Step, Steps
from k2dist.ids import Generation, RequestId
from k2dist.messages import Request, Sampling, StepPlan
from k2dist.parallel import first_layout
from k2dist.scheduler import Limits

LIMITS = Limits(step_tokens=48, max_running=8, max_waiting=64, chunk_tokens=24)
DRAWN = Sampling(temperature=1.0, seed=5, max_tokens=10, ignore_eos=True, frequency_penalty=0.5, logprobs=2)
PROMPTS = [[3], [5, 17, 99], list(range(3, 70)), list(range(40, 0, -3))]


def open_world(model_dir: Path, lanes: int, tp: int) -> LocalWorld:
    layout = first_layout(read_architecture(model_dir), lanes=lanes, tp=tp)
    return LocalWorld(
        model_dir, layout, limits=LIMITS, page_tokens=16, num_pages=64, dtype="float32", step_deadline_s=60
    )


def test_launches_run_in_order_and_bring_back_what_came_of_them() -> None:
    seen: list[int] = []
    error = ZeroDivisionError("a bug")

    def fail() -> None:
        raise error

    with DeviceThread("device") as device:
        launched = [device.launch(lambda i=i: seen.append(i) or i) for i in range(50)]
        failed = device.launch(fail)
        last = device.launch(lambda: 7)
        assert [future.result(10) for future in launched] == list(range(50)) == seen
        assert failed.exception(10) is error
        assert last.result(10) == 7, "a failure ends one launch, not the thread"
    assert device.busy_s > 0


def test_at_its_end_the_launch_under_way_is_waited_for_and_the_others_are_dropped() -> None:
    has_begun, may_end, done = threading.Event(), threading.Event(), []

    def slow() -> None:
        has_begun.set()
        may_end.wait(10)
        done.append("slow")

    device = DeviceThread("device")
    with device:
        device.launch(slow)
        dropped = device.launch(lambda: done.append("dropped"))
        has_begun.wait(10)
        threading.Timer(0.05, may_end.set).start()
    assert done == ["slow"]
    assert dropped.cancelled()
    with device:
        assert device.launch(lambda: 3).result(10) == 3, "it can be opened again"


@pytest.mark.parametrize(("lanes", "tp"), [(1, 1), (2, 1), (1, 2)])
def test_a_step_is_planned_and_agreed_on_while_the_one_before_computes(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, lanes: int, tp: int
) -> None:
    """Rank 0's device stands still in a step until all ranks have launched the next one."""
    world = open_world(tiny_model_dir, lanes, tp)
    run, forward = ForwardPass.run, Steps.forward
    num_held, num_forwards = 0, 0
    launches: dict[int, int] = {}  # by step
    is_next_launched = threading.Event()

    def hold(passes: ForwardPass, staged: StagedBatch) -> Hidden:
        nonlocal num_held
        if passes._model is world.ranks[0]._model:
            num_held += 1
            if num_held == 4:
                assert is_next_launched.wait(20), "nobody planned the next step meanwhile"
        return run(passes, staged)

    def note(steps: Steps, plan: StepPlan, before: Step | None, agreed: StepAgreement) -> Step:
        nonlocal num_forwards
        launched = forward(steps, plan, before, agreed)
        if steps._model is world.ranks[0]._model:
            num_forwards += 1
        launches[plan.step] = launches.get(plan.step, 0) + 1
        if num_forwards == 5 and launches[plan.step] == world.layout.world_size:
            is_next_launched.set()
        return launched

    monkeypatch.setattr(ForwardPass, "run", hold)
    monkeypatch.setattr(Steps, "forward", note)
    with world:
        world.generate(PROMPTS, DRAWN)
    assert is_next_launched.is_set()


@pytest.mark.parametrize(("lanes", "tp"), [(1, 1), (2, 1), (1, 2)])
def test_a_step_that_follows_at_once_gives_the_same_bits(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, lanes: int, tp: int
) -> None:
    """As on a device: the device thread goes on to the next forward pass before it tells of a step."""
    with open_world(tiny_model_dir, lanes, tp) as world:
        wanted = world.generate(PROMPTS, DRAWN)
    init, run, order = Steps.__init__, Follow.run, []

    def leading(steps: Steps, *arguments: Any) -> None:
        init(steps, *arguments)
        steps._leads = True

    def noted(follow: Follow[Any], token_ids: Sequence[int]) -> None:
        give_up_s = time.monotonic() + 0.2  # as a device's step would take; none comes behind the last one
        while follow._offered is None and time.monotonic() < give_up_s:
            time.sleep(1e-3)
        order.append(follow._offered is not None)
        run(follow, token_ids)

    monkeypatch.setattr(Steps, "__init__", leading)
    monkeypatch.setattr(Follow, "run", noted)
    with open_world(tiny_model_dir, lanes, tp) as world:
        assert world.generate(PROMPTS, DRAWN) == wanted
    assert any(order), "steps are planned while the one before computes"


def test_what_follows_a_step_is_done_once_or_not_at_all() -> None:
    early, late, failed, broken = Follow[int](), Follow[int](), Follow[int](), Follow[int]()
    future = early.offer(sum)
    early.run([3, 4])
    assert future is not None
    assert future.result(1) == 7
    late.run([3, 4])
    assert late.offer(sum) is None, "the step was told of: it is launched like any other"
    dropped = failed.offer(sum)
    failed.close()
    assert dropped is not None
    assert dropped.cancelled()
    raising = broken.offer(lambda ids: ids[9])
    broken.run([1])
    assert raising is not None
    assert isinstance(raising.exception(1), IndexError)


def test_a_plan_is_never_more_than_one_step_ahead(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And where there is work, it is one step ahead: the steps do overlap."""
    ahead: list[int] = []
    plan, commit = LanePort.plan, LanePort.commit
    in_flight: dict[int, int] = {}

    def planned(port: LanePort, generation: Generation, step: int, *, prefill: bool) -> StepPlan:
        made = plan(port, generation, step, prefill=prefill)
        if made.grants:
            ahead.append(in_flight.get(port.lane, 0))
            in_flight[port.lane] = in_flight.get(port.lane, 0) + 1
        return made

    def committed(port: LanePort, result: object) -> None:
        in_flight[port.lane] -= 1
        commit(port, result)  # type: ignore[arg-type]

    monkeypatch.setattr(LanePort, "plan", planned)
    monkeypatch.setattr(LanePort, "commit", committed)
    with open_world(tiny_model_dir, 2, 1) as world:
        world.generate(PROMPTS, DRAWN)
    assert set(ahead) == {0, 1}
    assert sum(ahead) > 0.7 * len(ahead)


@pytest.mark.parametrize(("lanes", "tp"), [(4, 1), (2, 2)])
def test_lanes_that_wake_at_the_same_time_all_answer(tiny_model_dir: Path, lanes: int, tp: int) -> None:
    """Thirty times all lanes fall asleep and get work at once, each from a thread of its own."""
    with open_world(tiny_model_dir, lanes, tp) as world:
        after = [0] * lanes
        for turn in range(30):
            barrier = threading.Barrier(lanes)

            def ask(port: LanePort, barrier: threading.Barrier = barrier, turn: int = turn) -> None:
                sampling = Sampling(temperature=0.0, max_tokens=2, ignore_eos=True)
                name = RequestId(f"{turn}-{port.lane}")
                barrier.wait(20)
                port.admit((Request(request_id=name, prompt=(3, turn + 1), sampling=sampling),))

            threads = [threading.Thread(target=ask, args=(port,)) for port in world.ports]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(20)
            for lane, port in enumerate(world.ports):
                events = []
                while not any(event.finish for event in events):
                    batch = port.events(after[lane], 20.0)
                    assert batch.events, f"lane {lane} did not wake in turn {turn}"
                    after[lane] = batch.next
                    events += batch.events
                assert sum(len(event.token_ids) for event in events) == 2


def test_prompts_are_computed_in_the_same_steps_on_all_lanes(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `prefill_every=3` two steps between are decodes alone, on both lanes; the bits stay the same."""
    kinds: dict[int, set[bool]] = {}
    forward = Steps.forward

    def note(steps: Steps, plan: StepPlan, before: Step | None, agreed: StepAgreement) -> Step:
        kinds.setdefault(plan.step, set()).update(steps._sequences.is_prompt(grant) for grant in plan.grants)
        return forward(steps, plan, before, agreed)

    monkeypatch.setattr(Steps, "forward", note)
    prompts = [list(range(1 + i, 60 + i)) for i in range(8)]

    def run(every: int) -> list[Generated]:
        kinds.clear()
        layout = first_layout(read_architecture(tiny_model_dir), lanes=2, tp=1)
        limits = Limits(step_tokens=32, max_running=8, max_waiting=64, chunk_tokens=16, prefill_every=every)
        with LocalWorld(
            tiny_model_dir, layout, limits=limits, page_tokens=16, num_pages=128, dtype="float32"
        ) as world:
            return world.generate(prompts, DRAWN)

    outputs = run(3)
    steps = [kinds[step] for step in sorted(kinds)]
    mixed = [index for index, kind in enumerate(steps) if kind == {True, False}]
    assert len(mixed) > 3
    assert all(b - a >= 3 for a, b in pairwise(mixed))
    assert run(1) == outputs
