"""Sampling as a lane does it: prompt logprobs, penalties over a sequence's life, several outputs."""

import math
from collections import Counter
from pathlib import Path

import pytest
from torch import Tensor

from k2dist.config import read_architecture
from k2dist.engine import Generated, LocalWorld
from k2dist.engine.kernels import select_kernels
from k2dist.engine.solo import solo_logits
from k2dist.ids import RequestId
from k2dist.messages import Event, Request, Sampling
from k2dist.parallel import first_layout
from k2dist.scheduler import Limits
from k2dist.text import Tokenizer, end_token_ids

PROMPTS = [[(7 * i + 13 * j * j + 5) % 256 for j in range(n)] for i, n in enumerate((1, 2, 37, 60))]
SCORED = Sampling(temperature=0.0, max_tokens=3, ignore_eos=True, prompt_logprobs=4)


def open_world(
    model_dir: Path, *, lanes: int = 1, tp: int = 1, chunk_tokens: int = 24, num_pages: int = 64
) -> LocalWorld:
    return LocalWorld(
        model_dir,
        first_layout(read_architecture(model_dir), lanes=lanes, tp=tp),
        limits=Limits(step_tokens=48, max_running=8, max_waiting=64, chunk_tokens=chunk_tokens),
        page_tokens=16,
        num_pages=num_pages,
        dtype="float32",
        step_deadline_s=60,
    )


def logits(model_dir: Path, token_ids: list[int]) -> Tensor:
    return solo_logits(model_dir, token_ids, select_kernels("reference", "float32"))


@pytest.fixture(scope="module")
def scored(tiny_model_dir: Path) -> list[Generated]:
    with open_world(tiny_model_dir) as world:
        return world.generate(PROMPTS, SCORED)


def test_prompt_logprobs_are_the_log_softmax_of_the_logits(
    tiny_model_dir: Path, scored: list[Generated]
) -> None:
    for prompt, output in zip(PROMPTS, scored, strict=True):
        assert [one.token_id for one in output.prompt_logprobs] == prompt[1:]
        logprob_TV = logits(tiny_model_dir, prompt).double().log_softmax(1)
        for logprob_V, one in zip(logprob_TV, output.prompt_logprobs, strict=False):
            top_C = logprob_V.argsort(descending=True, stable=True)[:4]
            assert [i for i, _ in one.top] == top_C.tolist()
            assert [x for _, x in one.top] == pytest.approx(logprob_V[top_C].tolist(), abs=1e-10)
            assert one.logprob == pytest.approx(float(logprob_V[one.token_id]), abs=1e-10)


@pytest.mark.parametrize(
    ("chunk_tokens", "lanes", "num_pages"), [(7, 1, 64), (48, 2, 64), (16, 1, 5)], ids=str
)
def test_no_cut_lane_or_preemption_changes_a_bit_of_them(
    tiny_model_dir: Path, scored: list[Generated], chunk_tokens: int, lanes: int, num_pages: int
) -> None:
    with open_world(tiny_model_dir, lanes=lanes, chunk_tokens=chunk_tokens, num_pages=num_pages) as world:
        again = world.generate(PROMPTS, SCORED)
        assert [(o.token_ids, o.prompt_logprobs) for o in again] == [
            (o.token_ids, o.prompt_logprobs) for o in scored
        ]
        repeated = world.generate(PROMPTS, SCORED)
        assert [o.prompt_logprobs for o in repeated] == [o.prompt_logprobs for o in scored], "no prefix hits"


def test_tp_ranks_give_them_too(tiny_model_dir: Path, scored: list[Generated]) -> None:
    with open_world(tiny_model_dir, tp=2) as world:
        outputs = world.generate(PROMPTS, SCORED)
    with open_world(tiny_model_dir, tp=2, chunk_tokens=9) as world:
        assert world.generate(PROMPTS, SCORED) == outputs
    for output, alone in zip(outputs, scored, strict=True):
        assert output.token_ids == alone.token_ids
        for one, other in zip(output.prompt_logprobs, alone.prompt_logprobs, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


def collect(world: LocalWorld, request: Request) -> list[Event]:
    (port,) = world.ports
    after = port.events(0, 0.0).next
    (reply,) = port.admit((request,))
    assert reply.error == ""
    events: list[Event] = []
    while sum(event.finish is not None for event in events) < request.num_outputs:
        batch = port.events(after, 10.0)
        after = batch.next
        events += batch.events
    return events


def test_they_come_with_output_0_in_chunks_before_its_tokens(tiny_model_dir: Path) -> None:
    request = Request(request_id=RequestId("a"), prompt=tuple(PROMPTS[2]), sampling=SCORED, num_outputs=3)
    with open_world(tiny_model_dir, chunk_tokens=10) as world:
        events = collect(world, request)
    scores = [event for event in events if event.prompt_logprobs]
    assert [event.output_index for event in scores] == [0] * 4
    assert [(event.first_prompt_index, len(event.prompt_logprobs)) for event in scores] == [
        (1, 10),
        (11, 10),
        (21, 10),
        (31, 6),
    ]
    tokens = [event for event in events if event.output_index == 0 and event.token_ids]
    assert events.index(tokens[0]) > events.index(scores[-1])


def test_outputs_of_a_request_draw_apart_and_the_same_again(tiny_model_dir: Path) -> None:
    sampling = Sampling(temperature=1.5, top_p=0.9, seed=3, max_tokens=12, ignore_eos=True)
    with open_world(tiny_model_dir) as world:
        drawn = []
        for name in "ab":
            request = Request(request_id=RequestId(name), prompt=(1, 2, 3), sampling=sampling, num_outputs=3)
            outputs: dict[int, list[int]] = {0: [], 1: [], 2: []}
            for event in collect(world, request):
                outputs[event.output_index] += event.token_ids
            drawn.append(outputs)
    assert drawn[0] == drawn[1]
    assert len({tuple(tokens) for tokens in drawn[0].values()}) == 3
    assert all(len(tokens) == 12 for tokens in drawn[0].values())


PENALISED = Sampling(
    temperature=0.0,
    max_tokens=14,
    min_tokens=14,
    repetition_penalty=1.3,
    presence_penalty=0.4,
    frequency_penalty=0.3,
    logit_bias={11: 1.0, 200: -5.0},
)


def test_penalties_count_every_token_of_a_sequence(tiny_model_dir: Path) -> None:
    """Greedy, against a plain loop over the whole sequence's logits."""
    prompt = PROMPTS[2]
    with open_world(tiny_model_dir) as world:
        (output,) = world.generate([prompt], PENALISED)
    logit_TV = logits(tiny_model_dir, prompt + output.token_ids)
    ends = end_token_ids(Tokenizer.load(tiny_model_dir), read_architecture(tiny_model_dir).eos_token_ids)
    for i, token_id in enumerate(output.token_ids):
        counts = Counter(output.token_ids[:i])
        adjusted = plain_adjusted(logit_TV[len(prompt) - 1 + i].tolist(), {*prompt, *counts}, counts)
        adjusted = [-math.inf if i in ends else x for i, x in enumerate(adjusted)]  # min_tokens
        assert adjusted.index(max(adjusted)) == token_id, f"token {i}"


def plain_adjusted(logit: list[float], seen: set[int], counts: Counter[int]) -> list[float]:
    adjusted = [x + PENALISED.logit_bias.get(i, 0.0) for i, x in enumerate(logit)]
    for i in seen:
        adjusted[i] *= PENALISED.repetition_penalty ** -math.copysign(1, adjusted[i])
    for i, count in counts.items():
        adjusted[i] -= PENALISED.presence_penalty + PENALISED.frequency_penalty * count
    return adjusted


def test_penalties_survive_preemption(tiny_model_dir: Path) -> None:
    with open_world(tiny_model_dir) as world:
        alone = [world.generate([prompt], PENALISED)[0] for prompt in PROMPTS]
    with open_world(tiny_model_dir, num_pages=5) as world:
        together = world.generate(PROMPTS, PENALISED)
    assert [o.token_ids for o in together] == [o.token_ids for o in alone]
