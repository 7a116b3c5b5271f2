"""A rank that stands still is named while the others wait for it, and nobody is once it goes on."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from k2dist.config import read_architecture
from k2dist.engine import LocalWorld
from k2dist.messages import Sampling
from k2dist.observe import Hang, RankView, find_hang
from k2dist.parallel import first_layout
from k2dist.scheduler import Limits

LIMITS = Limits(step_tokens=48, max_running=8, max_waiting=64, chunk_tokens=24)
GREEDY = Sampling(temperature=0.0, max_tokens=6, ignore_eos=True)
BOUND_S = 0.3
LATE = 3


def views(world: LocalWorld) -> list[RankView]:
    found = []
    for rank in world.ranks:
        stats = rank.stats()
        place = world.layout.place(stats.world_rank)
        found.append(
            RankView(
                world_rank=stats.world_rank, lane=place.lane, tp_rank=place.tp_rank, state="joined"
            ).told(stats)
        )
    return found


def await_hang(world: LocalWorld) -> Hang:
    give_up_s = time.monotonic() + 20
    while (hang := find_hang(views(world), BOUND_S)) is None:
        assert time.monotonic() < give_up_s, "nobody is late"
        time.sleep(0.02)
    return hang


@pytest.mark.parametrize("where", ["in its step loop", "in a layer"])
def test_the_late_rank_is_named(tiny_model_dir: Path, where: str) -> None:
    layout = first_layout(read_architecture(tiny_model_dir), lanes=2, tp=2)
    goes_on, stood = threading.Event(), threading.Event()
    with LocalWorld(tiny_model_dir, layout, limits=LIMITS, page_tokens=16, num_pages=16) as world:
        late = world.ranks[LATE]
        place = late._sequences if where == "in its step loop" else late._member.exchange  # type: ignore[union-attr]
        name = "apply" if where == "in its step loop" else "dispatch"
        original = getattr(place, name)

        def stand_still(*arguments: object) -> object:
            stood.set()
            assert goes_on.wait(30)
            return original(*arguments)

        setattr(place, name, stand_still)
        answers: list[list[int]] = []
        asking = threading.Thread(
            target=lambda: answers.extend(o.token_ids for o in world.generate([(1, 2, 3), (4, 5)], GREEDY))
        )
        asking.start()
        try:
            assert stood.wait(20)
            hang = await_hang(world)
            assert hang.late == (LATE,)
            assert hang.waiting, "somebody waits"
            assert f"rank {LATE} is late" in str(hang)
        finally:
            goes_on.set()
            asking.join()
        assert [len(ids) for ids in answers] == [6, 6]
        time.sleep(2 * BOUND_S)
        assert find_hang(views(world), BOUND_S) is None, "asleep, and nobody waits"


def test_time_in_collectives_is_counted_by_group_and_call(tiny_model_dir: Path) -> None:
    layout = first_layout(read_architecture(tiny_model_dir), lanes=1, tp=2)
    with LocalWorld(tiny_model_dir, layout, limits=LIMITS, page_tokens=16, num_pages=16) as world:
        world.generate([(1, 2, 3)], GREEDY)
        groups = {group.group: group for group in world.ranks[1].stats().groups}
    assert set(groups) == {"world", "world-control", "lane", "lane-control"}
    calls = {name: {c.call: c.num_calls for c in group.collectives} for name, group in groups.items()}
    num_steps = world.ranks[1].stats().num_steps
    assert calls["world-control"]["exchange_ints"] >= num_steps
    assert calls["world"]["all_to_all_rows"] == 2 * 3 * num_steps, "counts, rows and outputs of 2 MoE layers"
    assert all(c.wait_s_total >= 0 for group in groups.values() for c in group.collectives)
