"""Ranks in processes over gloo give the bits of ranks in threads: tokens and logprobs, in any layout.

Whether these exchange tokens exactly, or in frames in which a skewed router's rows do not always fit: threads
exchange them exactly. Run as a script this file is one rank, of one run after another: PORT WORLD_RANK
MODEL_DIR SKEWED_MODEL_DIR OUT.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from itertools import product
from pathlib import Path

import msgspec
import pytest

from k2dist.comm import DistCommunicator, host_store, join_store
from k2dist.config import read_architecture
from k2dist.engine import LocalWorld, RankComms, RankRuntime, RankSpec
from k2dist.ids import Generation, RequestId, WorldRank
from k2dist.messages import Event, Message, Request, Sampling
from k2dist.parallel import Layout, first_layout
from k2dist.scheduler import Limits

ADDRESS = "127.0.0.1"
DEADLINE_S = 60.0
NUM_RANKS = 4
LAYOUTS = {  # (lanes, tp, expert_only_ranks)
    "tp 4": (1, 4, 0),
    "2 lanes of tp 2": (2, 2, 0),
    "a lane of tp 2 and two ranks with experts alone": (1, 2, 2),
    "4 lanes, two without work": (4, 1, 0),
}
FORMS = ("exact", "padded")
RUNS = tuple(product(LAYOUTS, FORMS))
PAGE_TOKENS, NUM_PAGES = 16, 32
# By form. A frame for hardly any rows still has room for 11 pairs by chance. Of 16 skewed sequences a rank
# sends 12 or 24 to one rank, until some have ended.
LIMITS = {
    "exact": Limits(step_tokens=32, chunk_tokens=16, max_running=4, max_waiting=16),
    "padded": Limits(step_tokens=32, chunk_tokens=16, max_running=16, max_waiting=16),
}
FACTORS = {"exact": None, "padded": 0.01}
LENGTHS = {"exact": (1, 40, 3), "padded": (2,) * 16}


class Brought(Message, frozen=True, kw_only=True):
    """What came of one run on one rank."""

    events: list[Event]
    num_steps_padded: int
    num_overflows: int


def requests(form: str) -> list[Request]:
    return [
        Request(
            request_id=RequestId(str(i)),
            prompt=tuple((11 * i + 5 * j * j + 3) % 250 for j in range(num_tokens)),
            sampling=Sampling(temperature=0.8, seed=7, max_tokens=6 + i % 3, ignore_eos=True, logprobs=2),
        )
        for i, num_tokens in enumerate(LENGTHS[form])
    ]


def layout(name: str, model_dir: Path) -> Layout:
    lanes, tp, expert_only_ranks = LAYOUTS[name]
    return first_layout(read_architecture(model_dir), lanes=lanes, tp=tp, expert_only_ranks=expert_only_ranks)


def lane_of(prompt: int, num_lanes: int) -> int:
    return prompt % min(num_lanes, 2)


class StoreBells:
    """Doorbells over the rendezvous store: a ring is a key; a thread of each rank waits for the next."""

    def __init__(self, prefix: str, port: int, runtime: RankRuntime) -> None:
        self._prefix, self._port, self._runtime = prefix, port, runtime
        threading.Thread(target=self._listen, daemon=True).start()

    def ring_all(self, epoch: int) -> None:
        join_store(ADDRESS, self._port, DEADLINE_S).set(f"{self._prefix}/rung/{epoch}", "1")

    def _listen(self) -> None:
        store = join_store(ADDRESS, self._port, 10 * DEADLINE_S)
        for epoch in range(100):
            store.get(f"{self._prefix}/rung/{epoch}")
            self._runtime.ring(epoch)


def run_rank(port: int, world_rank: WorldRank, model_dir: Path, number: int) -> Brought:
    """One rank of one run until every lane is done; the events of its lane, if it is the first of one."""
    name, form = RUNS[number]
    world = layout(name, model_dir)
    store = join_store(ADDRESS, port, DEADLINE_S)

    def group(label: str, members: tuple[WorldRank, ...]) -> DistCommunicator:
        return DistCommunicator(
            store,
            generation=Generation(number),
            name=label,
            members=members,
            world_rank=world_rank,
            address=ADDRESS,
            deadline_s=DEADLINE_S,
            join_deadline_s=DEADLINE_S,
        )

    everyone = tuple(place.world_rank for place in world.ranks)
    lane = world.place(world_rank).lane
    members = None if lane is None else world.members(lane)
    comms = RankComms(
        group("world", everyone),
        group("world-control", everyone),
        None if members is None else group(f"lane-{lane}", members),
        None if members is None else group(f"lane-{lane}-control", members),
    )
    runtime = RankRuntime(
        RankSpec(
            model_dir=str(model_dir),
            layout=world,
            world_rank=world_rank,
            page_tokens=PAGE_TOKENS,
            num_pages=NUM_PAGES,
            limits=LIMITS[form],
            capacity_factor=FACTORS[form],
        )
    )
    runtime.load()
    runtime.join(comms, StoreBells(str(number), port, runtime), Generation(number))
    steps = threading.Thread(target=runtime.run)
    steps.start()
    events: list[Event] = []
    if runtime.port is not None:
        mine = tuple(
            request for i, request in enumerate(requests(form)) if lane_of(i, world.num_lanes) == lane
        )
        assert all(not reply.error for reply in runtime.port.admit(mine))
        while sum(event.finish is not None for event in events) < len(mine):
            events += runtime.port.events(len(events), DEADLINE_S).events
        if store.add(f"{number}/done", 1) == world.num_lanes:
            runtime.stop()  # takes all others along
    steps.join()
    stats = runtime.stats()
    return Brought(events=events, num_steps_padded=stats.num_steps_padded, num_overflows=stats.num_overflows)


def main(port: str, world_rank: str, model_dir: str, skewed_model_dir: str, out: str) -> None:
    model_dirs = {"exact": Path(model_dir), "padded": Path(skewed_model_dir)}
    brought = [
        run_rank(int(port), WorldRank(int(world_rank)), model_dirs[form], number)
        for number, (_, form) in enumerate(RUNS)
    ]
    Path(out).write_bytes(msgspec.msgpack.encode(brought))


@pytest.fixture(scope="module")
def brought(
    tiny_model_dir: Path, skewed_model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], list[Brought]]:
    """By run, then by rank."""
    store, out = host_store(ADDRESS), tmp_path_factory.mktemp("gloo")
    model_dirs = (str(tiny_model_dir), str(skewed_model_dir))
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(store.port), str(w), *model_dirs, str(out / str(w))],
            # The code of this checkout, whichever one is installed.
            env={"OMP_NUM_THREADS": "1", "PATH": "", "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        for w in range(NUM_RANKS)
    ]
    try:
        assert [rank.wait(4 * DEADLINE_S) for rank in ranks] == [0] * NUM_RANKS
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    decoder = msgspec.msgpack.Decoder(list[Brought])
    by_rank = [decoder.decode((out / str(w)).read_bytes()) for w in range(NUM_RANKS)]
    return dict(zip(RUNS, map(list, zip(*by_rank, strict=True)), strict=True))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_gloo_gives_the_bits_of_threads(
    name: str,
    form: str,
    brought: dict[tuple[str, str], list[Brought]],
    tiny_model_dir: Path,
    skewed_model_dir: Path,
) -> None:
    model_dir = tiny_model_dir if form == "exact" else skewed_model_dir
    world, asked = layout(name, model_dir), requests(form)
    with LocalWorld(
        model_dir, world, limits=LIMITS[form], page_tokens=PAGE_TOKENS, num_pages=NUM_PAGES
    ) as threads:
        expected = threads.generate(
            [request.prompt for request in asked],
            [request.sampling for request in asked],
            lane_of=lambda i: lane_of(i, world.num_lanes),
        )
    ranks = brought[name, form]
    for i, output in enumerate(expected):
        events = [event for rank in ranks for event in rank.events if event.request_id == str(i)]
        assert [token_id for event in events for token_id in event.token_ids] == output.token_ids
        assert [logprob for event in events for logprob in event.logprobs] == output.logprobs
    assert len({(rank.num_steps_padded, rank.num_overflows) for rank in ranks}) == 1, "all repeat alike"
    if form == "padded":
        assert 0 < ranks[0].num_overflows < ranks[0].num_steps_padded, "frames that fit, and that did not"


if __name__ == "__main__":
    main(*sys.argv[1:])
