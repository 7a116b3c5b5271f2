"""Recorded steps give the bits of eager ones: static buffers, rows that are none, NaN in all that is none.

The twin does anew what a CUDA graph would do, through the same code; what it spoils before each replay, a
replay must not read.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from k2dist.comm import Alone
from k2dist.config import read_architecture
from k2dist.engine import LocalWorld, RankComms, runtime
from k2dist.engine.form import FormRule
from k2dist.engine.graphs import CudaRecorder, TwinRecorder
from k2dist.engine.local import Generated
from k2dist.engine.recording import record_sizes
from k2dist.engine.static_batch import StaticBatch
from k2dist.ids import Generation
from k2dist.messages import RankProgress, RankStats, Sampling
from k2dist.model.pieces import Pieces
from k2dist.parallel import first_layout
from k2dist.scheduler import Limits

LIMITS = Limits(step_tokens=48, max_running=12, max_waiting=64, chunk_tokens=24)
DRAWN = Sampling(temperature=1.0, seed=5, max_tokens=9, ignore_eos=True, frequency_penalty=0.5, logprobs=2)
TOO_SMALL = 0.01
NUM_SIZES = 5 * 2  # 1, 2, 4, 8, 12 rows; 16 pages and all 64
# lanes, tp, ranks with experts alone; how many lanes have prompts
LAYOUTS = [(1, 1, 0, 1), (2, 2, 0, 1), (1, 2, 1, 1), (1, 1, 3, 1)]
SLOW_LAYOUTS = [(2, 1, 0, 2), (1, 2, 0, 1), (4, 1, 0, 3)]  # each a part of those


def run(
    model_dir: Path,
    shape: tuple[int, int, int, int],
    graphs: str,
    *,
    num_prompts: int = 7,
    capacity_factor: float | None = 1.0,
    dtype: str = "float32",
    num_pages: int = 64,
    kernels: str = "reference",
) -> tuple[list[Generated], list[RankStats]]:
    num_busy = shape[3]
    prompts = [[(7 * i + 13 * j * j + 5) % 256 for j in range(1 + 9 * (i % 4))] for i in range(num_prompts)]
    options = {"dtype": dtype, "kernels": kernels, "capacity_factor": capacity_factor, "num_pages": num_pages}
    with a_world(model_dir, shape, graphs, **options) as world:
        outputs = world.generate(prompts, DRAWN, lane_of=lambda i: i % num_busy)
    return outputs, [rank.stats() for rank in world.ranks]  # all have left after the same step


@contextmanager
def a_world(
    model_dir: Path,
    shape: tuple[int, int, int, int],
    graphs: str = "twin",
    *,
    start: bool = True,
    **options: Any,
) -> Iterator[LocalWorld]:
    lanes, tp, expert_only_ranks, _ = shape
    layout = first_layout(
        read_architecture(model_dir), lanes=lanes, tp=tp, expert_only_ranks=expert_only_ranks
    )
    options = {"dtype": "float32", "kernels": "reference", "capacity_factor": 1.0, "num_pages": 64} | options
    world = LocalWorld(
        model_dir,
        layout,
        limits=LIMITS,
        page_tokens=16,
        graphs=graphs,  # type: ignore[arg-type]
        step_deadline_s=60,
        **options,
    )
    try:
        if start:
            world.start()
        yield world
    finally:
        world.close()
    assert world.failure() is None


@pytest.mark.parametrize(
    "shape", [*LAYOUTS, *(pytest.param(shape, marks=pytest.mark.slow) for shape in SLOW_LAYOUTS)]
)
def test_replayed_steps_give_the_bits_of_eager_ones(
    tiny_model_dir: Path, shape: tuple[int, int, int, int]
) -> None:
    eager, stats = run(tiny_model_dir, shape, "off")
    assert {rank.num_steps_replayed for rank in stats} == {0}
    replayed, again = run(tiny_model_dir, shape, "twin")
    assert replayed == eager
    assert len({(rank.num_steps_replayed, rank.num_recorded) for rank in again}) == 1, "all replay alike"
    assert {rank.num_recorded for rank in again} == {NUM_SIZES}
    assert again[0].num_steps_replayed > 0
    assert {rank.num_decodes_eager for rank in again} == {0}
    assert [rank.expert_load for rank in again] == [rank.expert_load for rank in stats], "rows that are none"
    assert {rank.num_overflows for rank in again} == {0}


@pytest.mark.parametrize(
    ("kernels", "dtype"), [("reference", "bfloat16"), ("auto", "bfloat16")], ids=["reference", "native"]
)
def test_as_it_is_served(tiny_model_dir: Path, kernels: str, dtype: str) -> None:
    eager, _ = run(tiny_model_dir, (2, 1, 0, 2), "off", dtype=dtype, kernels=kernels)
    replayed, stats = run(tiny_model_dir, (2, 1, 0, 2), "twin", dtype=dtype, kernels=kernels)
    assert replayed == eager
    assert stats[0].num_steps_replayed > 0


def test_a_world_of_one_needs_no_capacity(tiny_model_dir: Path) -> None:
    eager, _ = run(tiny_model_dir, (1, 1, 0, 1), "off", capacity_factor=None)
    replayed, (stats,) = run(tiny_model_dir, (1, 1, 0, 1), "twin", capacity_factor=None)
    assert replayed == eager
    assert stats.num_steps_replayed > 0
    assert (stats.num_steps_padded, stats.num_bytes_sent) == (0, 0)


def test_without_a_capacity_more_ranks_run_eagerly(tiny_model_dir: Path) -> None:
    _, stats = run(tiny_model_dir, (2, 1, 0, 2), "twin", capacity_factor=None)
    assert {rank.num_steps_replayed for rank in stats} == {0}
    assert stats[0].num_decodes_eager > 0


@pytest.mark.parametrize("shape", [(1, 1, 0, 1), (2, 2, 0, 2), (1, 1, 3, 1)])
def test_recording_counts_nothing_but_graphs(tiny_model_dir: Path, shape: tuple[int, int, int, int]) -> None:
    """Nor does warming up: no row is any, and no step is a step."""
    told: list[RankProgress] = []
    with a_world(tiny_model_dir, shape, start=False) as world:
        world.start(lambda _, progress: told.append(progress))
        stats = [rank.stats() for rank in world.ranks]
    assert told[-1].num_sizes_warm == told[-1].num_sizes >= NUM_SIZES
    for rank in stats:
        assert rank.num_recorded == NUM_SIZES
        assert sum(map(sum, rank.expert_load)) == 0
        counted = (rank.num_rows_sent, rank.num_bytes_sent, rank.num_steps_padded, rank.num_overflows)
        assert (*counted, rank.num_steps, rank.num_steps_replayed) == (0,) * 6


def test_what_was_not_recorded_in_time_is_eager_on_all_ranks_and_counted(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One rank's time is over after three sizes, and no other's."""
    eager, _ = run(tiny_model_dir, (2, 1, 0, 2), "off")

    def on_a_slow_rank(*args: Any, **options: Any) -> FormRule:
        if threading.current_thread().name == "rank-1":
            options |= {"limit_s": 2.5, "clock": itertools.count().__next__}
        return record_sizes(*args, **options)

    monkeypatch.setattr(runtime, "record_sizes", on_a_slow_rank)
    found, stats = run(tiny_model_dir, (2, 1, 0, 2), "twin")
    assert found == eager
    assert {rank.num_recorded for rank in stats} == {2}, "and these are the largest"
    assert {rank.num_decodes_eager for rank in stats} == {0}
    monkeypatch.setattr(
        runtime, "record_sizes", lambda *args, **options: record_sizes(*args, **options | {"limit_s": -1.0})
    )
    found, stats = run(tiny_model_dir, (2, 1, 0, 2), "twin")
    assert found == eager
    assert {(rank.num_recorded, rank.num_steps_replayed) for rank in stats} == {(0, 0)}
    assert stats[0].num_decodes_eager == stats[1].num_decodes_eager > 0


def test_a_rank_that_cannot_record_keeps_nobody_waiting(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **options: Any) -> FormRule:
        if threading.current_thread().name == "rank-1":
            raise MemoryError("no room for a graph")
        return record_sizes(*args, **options)

    monkeypatch.setattr(runtime, "record_sizes", broken)
    layout = first_layout(read_architecture(tiny_model_dir), lanes=2, tp=1)
    world = LocalWorld(tiny_model_dir, layout, limits=LIMITS, capacity_factor=1.0, graphs="twin")
    with pytest.raises(MemoryError, match="no room for a graph"):
        world.start()
    world.close()


def test_a_new_generation_records_anew(tiny_model_dir: Path) -> None:
    with a_world(tiny_model_dir, (1, 1, 0, 1)) as world:
        (rank,) = world.ranks
        assert rank.stats().num_recorded == NUM_SIZES
    rank.join(RankComms(Alone(), Alone(), Alone(), Alone()), world, Generation(1))
    assert rank.stats().num_recorded == 0, "graphs go with their generation"
    noted: list[tuple[int, int]] = []
    rank.record(lambda *of: noted.append(of))
    assert noted == [(number, NUM_SIZES) for number in range(1, NUM_SIZES + 1)]
    assert rank.stats().num_recorded == NUM_SIZES


def test_a_replayed_step_that_did_not_fit_is_repeated_exactly(skewed_model_dir: Path) -> None:
    """Frames are sized for the bucket's rows; a skewed router fills them with the step's."""
    shape = (4, 1, 0, 1)
    eager, _ = run(skewed_model_dir, shape, "off", num_prompts=12, capacity_factor=None)
    replayed, stats = run(skewed_model_dir, shape, "twin", num_prompts=12, capacity_factor=TOO_SMALL)
    assert replayed == eager
    assert stats[0].num_overflows > 0
    assert stats[0].num_steps_replayed > 0
    assert len({rank.num_overflows for rank in stats}) == 1


def test_preempted_and_recomputed_rows_are_right_too(tiny_model_dir: Path) -> None:
    """Few pages: outputs lose them and are computed anew, several generated rows of one in a step."""
    eager, _ = run(tiny_model_dir, (1, 1, 0, 1), "off", num_pages=8, num_prompts=9)
    replayed, (stats,) = run(tiny_model_dir, (1, 1, 0, 1), "twin", num_pages=8, num_prompts=9)
    assert replayed == eager
    assert stats.num_steps_replayed > 0


def test_what_is_spoiled_would_be_seen(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If rows that are none had experts, their NaN would fill frames; if they were taken for rows, tokens."""
    monkeypatch.setattr(StaticBatch, "is_own_row", lambda batch: torch.ones_like(batch._own_row_t).bool())
    _, stats = run(tiny_model_dir, (2, 1, 0, 2), "off")
    _, spoiled = run(tiny_model_dir, (2, 1, 0, 2), "twin")
    assert [rank.expert_load for rank in spoiled] != [rank.expert_load for rank in stats]


class FakeGraphs:
    """Stands in for torch's: what is captured runs at once, and replays are counted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.replays: list[int] = []
        self.is_capturing = False
        self.stream = "the current one"
        self.num_graphs = 0
        outer = self

        class Graph:
            def __init__(self) -> None:
                self.number = outer.num_graphs
                outer.num_graphs += 1

            def replay(self) -> None:
                assert not outer.is_capturing
                outer.replays.append(self.number)

            def capture_begin(self, *, pool: object, capture_error_mode: str) -> None:
                assert (pool, capture_error_mode) == ("pool", "thread_local"), "other threads go on"
                assert outer.stream == "a stream of its own"
                outer.is_capturing = True

            def capture_end(self) -> None:
                outer.is_capturing = False

        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "Stream", lambda: "a stream of its own")
        monkeypatch.setattr(torch.cuda, "stream", self._on)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    @contextmanager
    def _on(self, stream: str) -> Iterator[None]:
        self.stream, before = stream, self.stream
        yield
        self.stream = before


@pytest.mark.parametrize("calls_outside", [False, True])
def test_calls_are_in_the_graph_or_between_graphs(
    monkeypatch: pytest.MonkeyPatch, *, calls_outside: bool
) -> None:
    fakes, made, given = FakeGraphs(monkeypatch), [], []

    def work() -> Pieces:
        for number in range(3):

            def call(number: int = number) -> Tensor:
                made.append((number, fakes.is_capturing))
                return torch.full((2,), float(len(made)))

            given.append((yield call))
        return torch.zeros(1)

    recording = CudaRecorder(calls_outside=calls_outside).record(work)
    assert made == [(number, not calls_outside) for number in range(3)]
    if not calls_outside:
        assert recording.replay() is recording.replay()
        assert fakes.replays == [0, 0]
        assert len(made) == 3, "a graph holds the calls"
        return
    assert fakes.num_graphs == 4
    assert fakes.replays == [0, 1, 2], "a call finds what the piece before it gives"
    addresses = [x.data_ptr() for x in given]
    assert recording.replay() is recording.replay()
    assert fakes.replays[3:] == [0, 1, 2, 3] * 2
    assert [number for number, _ in made[3:]] == [0, 1, 2] * 2
    assert [x.data_ptr() for x in given] == addresses
    assert [float(x[0]) for x in given] == [7.0, 8.0, 9.0], "what the last calls gave, where pieces read it"


def test_the_twin_gives_one_tensor_and_spoils_it_first() -> None:
    told: list[str] = []

    def work() -> Pieces:
        told.append("work")
        x = yield lambda: torch.ones(2)
        return x * len(told)

    recording = TwinRecorder(lambda: told.append("poison")).record(work)
    first = recording.replay()
    assert recording.replay() is first
    assert told == ["poison", "work"] * 2
    assert first.tolist() == [4.0, 4.0]
