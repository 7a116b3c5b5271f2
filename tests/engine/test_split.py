"""Two halves side by side give the bits of the whole, wherever it is cut; and one's exchange is behind the
other's attention."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from k2dist.config import read_architecture
from k2dist.engine import LocalWorld
from k2dist.engine.aside import Aside
from k2dist.engine.local import Generated
from k2dist.engine.split import halves
from k2dist.messages import Sampling
from k2dist.model.batch import Batch, PromptSegment
from k2dist.model.pieces import Call, Pieces, Waiting, in_line, side_by_side
from k2dist.parallel import first_layout
from k2dist.scheduler import Limits

DRAWN = Sampling(temperature=1.0, seed=5, max_tokens=5, ignore_eos=True, logprobs=2, prompt_logprobs=1)
LIMITS = Limits(step_tokens=48, max_running=12, max_waiting=64, chunk_tokens=30)


def work(name: str, num_calls: int, seen: list[str]) -> Pieces:
    total = torch.zeros(())
    for number in range(num_calls):
        seen.append(f"{name} piece {number}")

        def call(number: int = number) -> Tensor:
            seen.append(f"{name} call {number}")
            return torch.tensor(float(number))

        total = total + (yield call)
    seen.append(f"{name} end")
    return total


def in_order(seen: list[str]) -> Callable[[Call], Waiting]:
    def begin(call: Call) -> Waiting:
        result = call()
        return lambda: result

    return begin


def test_calls_begin_in_one_order_and_pieces_go_on_between() -> None:
    seen: list[str] = []
    results = side_by_side([work("a", 2, seen), work("b", 2, seen)], in_order(seen))
    assert [float(x) for x in results] == [1.0, 1.0]
    assert [what for what in seen if "call" in what] == ["a call 0", "b call 0", "a call 1", "b call 1"]
    assert seen.index("b piece 0") < seen.index("a piece 1")
    assert float(in_line(work("c", 3, []))) == 3.0
    assert float(in_line(work("c", 0, []))) == 0.0


def test_a_call_is_made_beside_the_other_works_piece() -> None:
    """The first work's call ends only when the second's piece has run."""
    has_run = threading.Event()

    def first() -> Pieces:
        def call() -> Tensor:
            assert has_run.wait(20), "nobody computed meanwhile"
            assert torch.is_inference_mode_enabled()
            return torch.ones(1)

        return (yield call)

    def second() -> Pieces:
        has_run.set()
        return (yield lambda: torch.zeros(1))

    results = side_by_side([first(), second()], Aside(torch.device("cpu")).begin)
    assert [float(x) for x in results] == [1.0, 0.0]


def test_a_failing_call_fails_the_step() -> None:
    def broken() -> Pieces:
        def call() -> Tensor:
            raise ConnectionError("a peer is gone")

        return (yield call)

    with pytest.raises(ConnectionError):
        side_by_side([broken(), work("b", 1, [])], Aside(torch.device("cpu")).begin)


def test_halves_hold_every_row_once() -> None:
    """Cut in the middle of a prompt; samples are put back in the order asked for."""
    batch = Batch(
        token_T=torch.arange(20, 27),
        position_T=torch.tensor([9, 4, 5, 6, 7, 3, 0]),
        write_T=torch.arange(40, 47),
        shares=(4, 3),
        prompts=(PromptSegment(1, 4, 4, torch.tensor([1, 2])), PromptSegment(6, 1, 0, torch.tensor([3]))),
        decode_row_R=torch.tensor([0, 5]),
        decode_length_R=torch.tensor([10, 4]),
        decode_page_RP=torch.tensor([[5, 6], [7, 0]]),
        sample_S=torch.tensor([6, 0, 4, 5, 1]),
    )
    batch.check()
    (first, second), place_S = halves(batch)
    for part, rows in ((first, range(4)), (second, range(4, 7))):
        part.check()
        assert part.token_T.tolist() == [20 + row for row in rows]
    assert [(p.row, p.num_rows, p.start) for p in first.prompts + second.prompts] == [
        (1, 3, 4),
        (0, 1, 7),
        (2, 1, 0),
    ]
    sampled = torch.cat([first.token_T[first.sample_S], second.token_T[second.sample_S]])
    assert torch.equal(sampled[place_S], batch.token_T[batch.sample_S])
    (one, none), _ = halves(first)
    assert (one.num_rows, none.num_rows) == (2, 2)
    assert halves(Batch.empty(2))[0][1].num_rows == 0


def run(
    model_dir: Path, shape: tuple[int, int], split_tokens: int | None, num_prompts: int = 6
) -> list[Generated]:
    layout = first_layout(read_architecture(model_dir), lanes=shape[0], tp=shape[1])
    prompts = [[(7 * i + 13 * j * j + 5) % 256 for j in range(1 + 17 * (i % 3))] for i in range(num_prompts)]
    with LocalWorld(
        model_dir,
        layout,
        limits=LIMITS,
        page_tokens=16,
        num_pages=64,
        dtype="float32",
        kernels="reference",
        split_tokens=split_tokens,
        step_deadline_s=60,
    ) as world:
        return world.generate(prompts, DRAWN, lane_of=lambda i: i % min(shape[0], 2))


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 2), (3, 1)])
def test_split_steps_give_the_bits_of_whole_ones(tiny_model_dir: Path, shape: tuple[int, int]) -> None:
    """From two rows on, prompts and generated rows, also on a lane without any."""
    assert run(tiny_model_dir, shape, 2) == run(tiny_model_dir, shape, None)
