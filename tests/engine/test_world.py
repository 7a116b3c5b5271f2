"""A world of threads: the same tokens in any layout and company; at equal tp the same bits."""

from pathlib import Path

import pytest
import torch

from k2dist.config import read_architecture
from k2dist.engine import LocalWorld
from k2dist.engine.local import Generated
from k2dist.errors import ConfigError
from k2dist.messages import FinishReason, Request, Sampling
from k2dist.parallel import Layout, first_layout
from k2dist.scheduler import Limits

LIMITS = Limits(step_tokens=48, max_running=8, max_waiting=64, chunk_tokens=24)
GREEDY = Sampling(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=2)


def prompts(vocab_size: int) -> list[list[int]]:
    return [
        [(7 * i + 13 * j * j + 5) % (vocab_size - 256) for j in range(n)]
        for i, n in enumerate((1, 5, 33, 70, 17))
    ]


def run(model_dir: Path, layout: Layout, *, dtype: str = "float32", num_pages: int = 64) -> list[Generated]:
    vocab_size = read_architecture(model_dir).vocab_size
    with LocalWorld(
        model_dir, layout, limits=LIMITS, page_tokens=16, num_pages=num_pages, dtype=dtype, step_deadline_s=60
    ) as world:
        return world.generate(prompts(vocab_size), GREEDY)


@pytest.fixture(scope="module")
def alone(tiny_model_dir: Path) -> list[Generated]:
    return run(tiny_model_dir, first_layout(read_architecture(tiny_model_dir), lanes=1, tp=1))


@pytest.mark.parametrize(
    ("lanes", "tp", "expert_only_ranks"),
    [(2, 1, 0), (4, 1, 0), (1, 2, 0), (2, 2, 0), (1, 4, 0), (1, 1, 3), (1, 2, 1), (3, 1, 1)],
)
def test_any_layout_gives_the_tokens_of_one_rank(
    tiny_model_dir: Path, alone: list[Generated], lanes: int, tp: int, expert_only_ranks: int
) -> None:
    layout = first_layout(
        read_architecture(tiny_model_dir), lanes=lanes, tp=tp, expert_only_ranks=expert_only_ranks
    )
    outputs = run(tiny_model_dir, layout)
    assert [o.token_ids for o in outputs] == [o.token_ids for o in alone]
    assert all(len(o.token_ids) == GREEDY.max_tokens and o.finish is FinishReason.LENGTH for o in outputs)
    if tp == 1:
        assert outputs == alone, "at equal tp the logprobs are the same bits too"


def test_preemption_changes_no_bit(tiny_model_dir: Path, alone: list[Generated]) -> None:
    layout = first_layout(read_architecture(tiny_model_dir), lanes=1, tp=1)
    assert run(tiny_model_dir, layout, num_pages=8) == alone


def test_served_arithmetic_is_the_same_in_company(tiny_model_dir: Path) -> None:
    """bfloat16 residual, FP8 activations: lanes and company change no bit."""
    architecture = read_architecture(tiny_model_dir)
    one = run(tiny_model_dir, first_layout(architecture, lanes=1, tp=1), dtype="bfloat16")
    four = run(
        tiny_model_dir, first_layout(architecture, lanes=2, tp=1, expert_only_ranks=2), dtype="bfloat16"
    )
    assert one == four


def test_a_world_sleeps_wakes_and_sleeps_again(tiny_model_dir: Path) -> None:
    layout = first_layout(read_architecture(tiny_model_dir), lanes=2, tp=2)
    with LocalWorld(
        tiny_model_dir, layout, limits=LIMITS, page_tokens=16, num_pages=64, dtype="float32"
    ) as world:
        first = world.generate([[1, 2, 3]], GREEDY, lane_of=lambda _: 1)
        again = world.generate([[1, 2, 3]], GREEDY, lane_of=lambda _: 0)
        assert first == again
        assert all(port.load().num_pages_free == 64 for port in world.ports)


def test_a_cancelled_request_gives_back_its_pages(tiny_model_dir: Path) -> None:
    layout = first_layout(read_architecture(tiny_model_dir), lanes=1, tp=1)
    with LocalWorld(
        tiny_model_dir, layout, limits=LIMITS, page_tokens=16, num_pages=64, dtype="float32"
    ) as world:
        (port,) = world.ports
        long = Request(
            request_id="long", prompt=(1, 2, 3), sampling=Sampling(max_tokens=900, ignore_eos=True)
        )
        (reply,) = port.admit((long,))
        assert reply.error == ""
        assert port.events(0, 10.0).events, "it runs"
        port.cancel((long.request_id,))
        world.generate([[5, 6]], GREEDY)
        assert port.load().num_pages_free == 64
        (live,) = [kept for kept in port.live() if kept.request == long]
        assert live.outputs[0].finish is FinishReason.ABORT


def test_a_bad_request_is_refused_alone(tiny_model_dir: Path) -> None:
    layout = first_layout(read_architecture(tiny_model_dir), lanes=1, tp=1)
    with LocalWorld(
        tiny_model_dir, layout, limits=LIMITS, page_tokens=16, num_pages=8, dtype="float32"
    ) as world:
        (port,) = world.ports
        good = Request(request_id="good", prompt=(1, 2), sampling=GREEDY)
        huge = Request(request_id="huge", prompt=(1,) * 400, sampling=GREEDY)
        accepted, refused = port.admit((good, huge))
        assert accepted.error == ""
        assert "page" in refused.error
        again, other = port.admit((good, Request(request_id="good", prompt=(9,), sampling=GREEDY)))
        assert again.error == ""
        assert other.field == "request_id"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has one")
def test_a_device_that_is_not_there_is_named(tiny_model_dir: Path) -> None:
    with pytest.raises(ConfigError, match="finds no CUDA device"):
        LocalWorld(tiny_model_dir, limits=LIMITS, device="cuda")
