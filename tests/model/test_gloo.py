"""The whole decoder in four processes over gloo: bit for bit what four threads give.

Run as a script this file is one rank: `test_gloo.py PORT WORLD_RANK OUT`. The processes live through all
layouts and both precisions, since importing torch takes seconds.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from k2kernels import KernelSet
from torch import Tensor

from k2dist.comm import DistCommunicator, host_store, join_store
from k2dist.config import Architecture
from k2dist.ids import Generation, LaneId
from k2dist.model.batch import Batch
from k2dist.parallel import Layout, first_layout

if TYPE_CHECKING:
    from tests.model.conftest import Rig

ADDRESS = "127.0.0.1"
DEADLINE_S = 60.0
NUM_RANKS = 4
SHAPES = [
    {"lanes": 1, "tp": 4},
    {"lanes": 2, "tp": 2},
    {"lanes": 1, "tp": 2, "expert_only_ranks": 2},
    {"lanes": 3, "tp": 1, "expert_only_ranks": 1},
]
DTYPES = [torch.float32, torch.bfloat16]


def layout_of(architecture: Architecture, number: int) -> Layout:
    return first_layout(architecture, **SHAPES[number])


def steps(
    rig: Rig, architecture: Architecture, layout: Layout, shuffle_seed: int
) -> Iterator[dict[int, Batch]]:
    """Prompts on the first lane and the last; then one row in all, fewer than tp ranks; then all."""
    rng, shuffle = random.Random(3), random.Random(shuffle_seed)
    first, second, third = (
        rig.sequence(architecture, num_tokens, prompt_len, 8 * i, rng)
        for i, (num_tokens, prompt_len) in enumerate(((40, 30), (25, 5), (36, 20)))
    )
    last = layout.num_lanes - 1
    work = [
        [(0, first, 0, 30), (0, second, 0, 5), (last, third, 0, 20)],
        [(last, third, 20, 21)],
        [(0, first, 30, 40), (0, second, 5, 25), (last, third, 21, 36)],
    ]
    for grants in work:
        by_lane: dict[int, list[Any]] = {}
        for lane, *grant in grants:
            by_lane.setdefault(lane, []).append(rig.grant(*grant))
        yield {lane: rig.batch(theirs, layout.tp, shuffle) for lane, theirs in by_lane.items()}


def rank_main(port: int, world_rank: int) -> list[Tensor]:
    """One process: its logits of every step of every layout and dtype."""
    rig = _rig()
    architecture = rig.architecture()
    published = rig.published(architecture)
    store = join_store(ADDRESS, port, DEADLINE_S)
    logits: list[Tensor] = []
    for generation, (number, dtype) in enumerate(itertools.product(range(len(SHAPES)), DTYPES)):
        layout = layout_of(architecture, number)

        def connect(name: str, members: tuple[int, ...], generation: int = generation) -> DistCommunicator:
            return DistCommunicator(
                store,
                generation=Generation(generation),
                name=name,
                members=members,
                world_rank=world_rank,
                address=ADDRESS,
                deadline_s=DEADLINE_S,
                join_deadline_s=DEADLINE_S,
            )

        world = connect("world", tuple(range(NUM_RANKS)))
        lane = layout.place(world_rank).lane
        lane_comm = None if lane is None else connect(f"lane{lane}", layout.members(lane))
        kernels = KernelSet.reference(dtype)
        rank = rig.rank.open(architecture, published, layout, world_rank, world, lane_comm, kernels)
        # Rows lie elsewhere in the batches of the processes than in those of the threads.
        logits += [rank.step(batches) for batches in steps(rig, architecture, layout, shuffle_seed=1)]
    return logits


def _rig() -> Any:
    """The conftest beside this file, when it runs as a script."""
    spec = importlib.util.spec_from_file_location("rig", Path(__file__).with_name("conftest.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["rig"] = module
    spec.loader.exec_module(module)
    return module.Rig()


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> list[list[Tensor]]:
    """What each rank's process computed."""
    folder = tmp_path_factory.mktemp("gloo")
    store = host_store(ADDRESS)
    roots = (Path(__file__).parents[2], *sys.path)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, roots))}
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(store.port), str(rank), str(folder / f"{rank}.pt")],
            env=environment,
        )
        for rank in range(NUM_RANKS)
    ]
    try:
        assert [rank.wait(timeout=2 * DEADLINE_S) for rank in ranks] == [0] * NUM_RANKS
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    return [torch.load(folder / f"{rank}.pt") for rank in range(NUM_RANKS)]


def test_processes_give_the_bits_of_threads(rig: Rig, processes: list[list[Tensor]]) -> None:
    architecture = rig.architecture()
    published = rig.published(architecture)
    by_rank = [iter(logits) for logits in processes]
    for number, dtype in itertools.product(range(len(SHAPES)), DTYPES):
        layout = layout_of(architecture, number)
        world = rig.world(architecture, published, layout, dtype=dtype)
        for batches in steps(rig, architecture, layout, shuffle_seed=2):
            expected = world.step(batches)
            logits = [next(results) for results in by_rank]
            for lane, wanted in expected.items():
                for member in layout.members(LaneId(lane)):
                    assert torch.equal(logits[member], wanted), f"{SHAPES[number]}, {dtype}, rank {member}"
    assert all(next(results, None) is None for results in by_rank)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.save(rank_main(int(sys.argv[1]), int(sys.argv[2])), sys.argv[3])
