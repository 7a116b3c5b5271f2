"""Rows become tokens and logprobs in runs of bounded memory, and no cut changes a bit."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from k2dist.comm import Alone, Communicator, thread_world
from k2dist.engine.readout import Outcome, PromptScore, Readout
from k2dist.errors import FaultyRankError
from k2dist.messages import Sampling
from k2dist.model.sampler import RowSampling, VocabularySlice, score

WIDTH, VOCABULARY = 16, 96
ROW_BYTES = 4 * VOCABULARY
SCORES = [[PromptScore(7 * i % VOCABULARY, i % 5) for i in range(n)] for n in (3, 0, 6)]
HOW = [Sampling(temperature=0.0), Sampling(temperature=0.8, top_p=0.7, logprobs=3), Sampling(logprobs=0)]


def rows() -> list[RowSampling]:
    return [RowSampling(HOW[i % 3], output_index=0, position=i) for i in range(8)]


def read(
    comm: Communicator, head_VD: Tensor, x_SD: Tensor, num_runs_rows: int, heights: list[int] | None = None
) -> Outcome:
    vocabulary = VocabularySlice.of(comm, VOCABULARY)
    head_vD = head_VD[vocabulary.first : vocabulary.first + vocabulary.width]

    def head(x_ND: Tensor) -> Tensor:
        if heights is not None:
            heights.append(len(x_ND))
        return torch.stack([head_vD @ x_D for x_D in x_ND])  # row by row: no library's order depends on N

    logit_bytes = num_runs_rows * ROW_BYTES // comm.size
    return Readout(head, vocabulary, frozenset({1}), logit_bytes).read(x_SD, rows(), SCORES)


@pytest.fixture
def model() -> tuple[Tensor, Tensor]:
    return torch.randn(VOCABULARY, WIDTH), torch.randn(8 + 9, WIDTH)


def test_no_cut_changes_a_bit(model: tuple[Tensor, Tensor]) -> None:
    head_VD, x_SD = model
    whole = read(Alone(), head_VD, x_SD, 100)
    assert len(whole.sampled.token_ids) == 8
    assert [len(some) for some in whole.prompt_logprobs] == [3, 0, 6]
    for num_rows in (1, 3, 8):
        assert read(Alone(), head_VD, x_SD, num_rows) == whole


def test_memory_bounds_the_rows_at_a_time(model: tuple[Tensor, Tensor]) -> None:
    heights: list[int] = []
    read(Alone(), *model, 3, heights)
    assert heights == [3, 3, 2, 3, 3, 3]
    heights.clear()
    read(Alone(), *model, 0, heights)
    assert heights == [1] * 17, "one row at least"


@pytest.mark.parametrize("tp", [2, 4])
def test_tp_ranks_read_alike(model: tuple[Tensor, Tensor], tp: int) -> None:
    head_VD, x_SD = model
    main: Callable[[Communicator], Outcome] = lambda comm: read(comm, head_VD, x_SD, 5)  # noqa: E731
    with ThreadPoolExecutor(tp) as pool:
        outcomes = list(pool.map(main, thread_world(tp, 30.0)))
    assert all(outcome == outcomes[0] for outcome in outcomes)
    alone = read(Alone(), head_VD, x_SD, 5)
    assert outcomes[0].sampled.token_ids == alone.sampled.token_ids


def test_each_prompt_token_is_scored_by_its_row(model: tuple[Tensor, Tensor]) -> None:
    head_VD, x_SD = model
    outcome = read(Alone(), head_VD, x_SD, 4)
    flat = [one for some in SCORES for one in some]
    logits_NV = torch.stack([head_VD @ x_D for x_D in x_SD[8:]])
    want = score(
        logits_NV,
        [one.token_id for one in flat],
        [one.num_top for one in flat],
        VocabularySlice.whole(VOCABULARY),
    )
    assert [one for some in outcome.prompt_logprobs for one in some] == want


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_head_that_gives_nonsense_is_found(model: tuple[Tensor, Tensor], value: float) -> None:
    head_VD, x_SD = model
    head_VD[VOCABULARY - 1, 0] = value
    with pytest.raises(FaultyRankError, match="8 of 8 rows hold NaN or infinity"):
        read(Alone(), head_VD, x_SD, 100)
