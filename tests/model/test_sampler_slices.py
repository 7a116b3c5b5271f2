"""Ranks that see slices of the vocabulary give, bit for bit, what the twin gives that sees whole rows."""

import math
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from k2dist.comm import Alone, thread_world
from k2dist.messages import Sampling
from k2dist.model.sampler import RowSampling, SeenTokens, VocabularySlice, sample, score
from k2dist.model.sampler.filters import choose_filtered
from k2dist.model.sampler.noise import bits
from k2dist.model.sampler.order import highest_keys, highest_of_keys
from k2dist.model.sampler.plain import noisiest_of_all, noisiest_of_rivals
from k2dist.model.sampler.twin import sample_whole, score_whole

K2_VOCABULARY = 163_840


def on_ranks(tp, vocab_size, rank_main):
    """`rank_main(vocabulary)` on every rank of a lane; what they give, which must be the same."""
    comms = thread_world(tp, 30.0) if tp > 1 else [Alone()]
    slices = [VocabularySlice.of(comm, vocab_size) for comm in comms]
    with ThreadPoolExecutor(tp) as pool:
        results = list(pool.map(rank_main, slices))
    assert all(result == results[0] for result in results), "tp ranks differ"
    return results[0]


def columns(logits_SV, vocabulary):
    return logits_SV[:, vocabulary.first : vocabulary.first + vocabulary.width]


def sample_on(tp, logits_SV, rows, end_token_ids=()):
    before_SV = logits_SV.clone()
    sampled = on_ranks(
        tp,
        logits_SV.shape[1],
        lambda vocabulary: sample(
            columns(logits_SV, vocabulary), rows, vocabulary, end_token_ids=end_token_ids
        ),
    )
    assert torch.equal(logits_SV, before_SV), "logits are not changed"
    return sampled


def score_on(tp, logits_SV, token_ids, num_top):
    return on_ranks(
        tp,
        logits_SV.shape[1],
        lambda vocabulary: score(columns(logits_SV, vocabulary), token_ids, num_top, vocabulary),
    )


def row(sampling, position=0, prompt=(), generated=()):
    return RowSampling(sampling, 0, position, len(generated), SeenTokens.of(prompt, generated))


# Every kind of row. Rows of one batch are of several kinds, as when serving.
KINDS = {
    "greedy": {"temperature": 0.0},
    "cold": {"temperature": 1e-190},
    "cool": {"temperature": 1e-7, "logprobs": 1},
    "noise": {"temperature": 0.6, "logprobs": 0},
    "hot": {"temperature": 100.0},
    "top_k": {"temperature": 0.7, "top_k": 40, "logprobs": 20},
    "top_k of 1": {"temperature": 0.7, "top_k": 1},
    "top_p": {"temperature": 0.6, "top_p": 0.95, "logprobs": 5},
    "narrow top_p": {"temperature": 1.0, "top_p": 0.001},
    "min_p": {"temperature": 0.8, "min_p": 0.05},
    "min_p of 1": {"temperature": 0.8, "min_p": 1.0},
    "all filters": {"temperature": 1.2, "top_k": 300, "top_p": 0.9, "min_p": 0.01, "logprobs": 1},
    "penalties": {"temperature": 0.0, "repetition_penalty": 1.3, "presence_penalty": 0.7, "logprobs": 2},
    "bias": {"temperature": 0.9, "top_p": 0.8, "logit_bias": {0: 3.3, 17: -100.0, 63: 100.0}},
    "waits": {"temperature": 0.0, "min_tokens": 9, "stop_token_ids": (3, 60), "frequency_penalty": 0.3},
}


def rows_of_all_kinds(count, vocab_size):
    samplings = [Sampling(seed=random.getrandbits(64), **kind) for kind in KINDS.values()]
    tokens = [random.randrange(vocab_size) for _ in range(30)]
    return [
        row(samplings[i % len(samplings)], i, tokens[:15], tokens[10 : 10 + i % 18]) for i in range(count)
    ]


def logits_of(shape, num_rows, vocab_size):
    match shape:
        case "flat":
            return torch.randn(num_rows, vocab_size) * 0.5
        case "peaked":
            return torch.randn(num_rows, vocab_size) * 4
        case "ties":
            return torch.randint(-6, 7, (num_rows, vocab_size)) / 2
        case "equal":
            return torch.zeros(num_rows, vocab_size).copysign(torch.randn(num_rows, vocab_size))


# -- against the twin --------------------------------------------------------------------------------------


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("shape", ["flat", "peaked", "ties", "equal"])
@pytest.mark.parametrize("vocab_size", [64, 9_000])
def test_slices_give_the_bits_of_whole_rows(shape, tp, vocab_size):
    num_rows = 3 * len(KINDS)
    logits_SV = logits_of(shape, num_rows, vocab_size)
    rows = rows_of_all_kinds(num_rows, vocab_size)
    ends = frozenset({1, 62})
    assert sample_on(tp, logits_SV, rows, ends) == sample_whole(logits_SV, rows, end_token_ids=ends)


MASKS = {
    "one token": lambda vocab_size: [vocab_size - 1],
    "one rank's": lambda vocab_size: range(vocab_size // 4 + 1, vocab_size // 2, 3),
    "few": lambda vocab_size: random.sample(range(vocab_size), 5),
    "half": lambda vocab_size: random.sample(range(vocab_size), vocab_size // 2),
    "all": range,
}


def mask_of(allowed, vocab_size):
    mask_B = torch.zeros(-(-vocab_size // 32) * 4, dtype=torch.uint8)
    for token_id in allowed:
        mask_B[token_id // 8] |= 1 << token_id % 8
    return mask_B


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("vocab_size", [64, 1_004])  # of 251 columns, which begin inside of a byte
@pytest.mark.parametrize("shape", ["peaked", "ties"])
def test_masked_rows_give_the_bits_of_whole_rows_and_allowed_tokens(shape, vocab_size, tp):
    num_rows = len(KINDS) * len(MASKS)
    allowed = [set(list(MASKS.values())[i % len(MASKS)](vocab_size)) for i in range(num_rows)]
    rows = [
        replace(row, mask=None if i % 7 == 6 else mask_of(allowed[i], vocab_size))
        for i, row in enumerate(rows_of_all_kinds(num_rows, vocab_size))
    ]
    rows = [replace(row, num_generated=9) for row in rows]  # who has a grammar holds no end token back
    logits_SV = logits_of(shape, num_rows, vocab_size)
    sampled = sample_on(tp, logits_SV, rows)
    assert sampled == sample_whole(logits_SV, rows)
    for token_id, ids, row in zip(sampled.token_ids, allowed, rows, strict=True):
        assert row.mask is None or token_id in ids


@pytest.mark.parametrize("tp", [1, 4])
def test_so_do_slices_of_k2s_vocabulary(tp):
    logits_SV = torch.cat([logits_of(shape, len(KINDS), K2_VOCABULARY) for shape in ("peaked", "flat")])
    rows = rows_of_all_kinds(len(logits_SV), K2_VOCABULARY)
    assert sample_on(tp, logits_SV, rows) == sample_whole(logits_SV, rows)


samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.5, 1.0, 1.7]),
    top_k=st.integers(0, 9),
    top_p=st.sampled_from([0.001, 0.25, 0.5, 0.9134567, 1.0]),
    min_p=st.sampled_from([0.0, 0.0123457, 0.3123457, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 0.4, 1.7]),
    presence_penalty=st.sampled_from([0.0, -1.1, 0.3]),
    frequency_penalty=st.sampled_from([0.0, -0.7, 1.3]),
    logit_bias=st.dictionaries(st.integers(0, 11), st.floats(-3, 3), max_size=3),
    min_tokens=st.integers(0, 2),
    stop_token_ids=st.lists(st.integers(0, 11), max_size=2).map(tuple),
    logprobs=st.sampled_from([None, 0, 3, 20]),
    seed=st.integers(0, 2**64 - 1),
)
cases = st.lists(
    st.tuples(
        st.lists(st.integers(-4, 4).map(lambda x: x / 2), min_size=12, max_size=12),
        samplings,
        st.lists(st.integers(0, 11), max_size=4),
        st.lists(st.integers(0, 11), max_size=4),
    ),
    min_size=1,
    max_size=4,
)


@pytest.mark.parametrize("tp", [1, 2, 4])
@settings(deadline=None, max_examples=60)
@given(cases=cases)
@example(cases=[([0.0] * 12, Sampling(temperature=1.0, top_k=5, top_p=0.5), [], [])])
def test_any_sampling_gives_the_bits_of_whole_rows(tp, cases):
    logits_SV = torch.tensor([logits for logits, *_ in cases])
    rows = [row(sampling, 7, prompt, generated) for _, sampling, prompt, generated in cases]
    assert sample_on(tp, logits_SV, rows, {5}) == sample_whole(logits_SV, rows, end_token_ids={5})


@pytest.mark.parametrize("tp", [1, 4])
@pytest.mark.parametrize("shape", ["flat", "peaked", "ties", "equal"])
def test_too_few_candidates_change_nothing(shape, tp):
    logits_SV = logits_of(shape, 60, 2048)
    filters = [{"top_p": 0.9}, {"top_k": 70, "top_p": 0.7}, {"min_p": 0.02}, {"top_k": 7}, {"top_k": 1500}]
    rows = [row(Sampling(temperature=0.9, **filters[i % 5]), i) for i in range(60)]
    want = list(sample_whole(logits_SV, rows).token_ids)
    for few in (1, 2, 30, 512):
        assert want == on_ranks(
            tp, 2048, lambda v, few=few: choose_filtered(columns(logits_SV, v), rows, v, few=few)
        ), f"few={few}"


@pytest.mark.parametrize("changes", [{}, {"top_p": 0.5}, {"min_p": 0.5}])
def test_the_coldest_temperature_is_greedy(changes):
    """The smallest float64: logits divided by it would all be infinite or 0."""
    logits_SV = torch.tensor([[3.0, 5.0, 5.0, 1e-45]]).repeat(50, 1)
    rows = [row(Sampling(temperature=5e-324, **changes), i) for i in range(50)]
    assert sample_on(2, logits_SV, rows).token_ids == (1,) * 50


# -- row independence --------------------------------------------------------------------------------------


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("vocab_size", [70, 20_002])
def test_a_row_does_not_depend_on_the_others(tp, vocab_size):
    num_rows = 2 * len(KINDS)
    logits_SV = logits_of("peaked", num_rows, vocab_size)
    rows = rows_of_all_kinds(num_rows, vocab_size)
    together = sample_on(tp, logits_SV, rows)
    order = random.sample(range(num_rows), num_rows)
    shuffled = sample_on(tp, logits_SV[order], [rows[i] for i in order])
    assert shuffled.token_ids == tuple(together.token_ids[i] for i in order)
    assert shuffled.logprobs == tuple(together.logprobs[i] for i in order)
    for i in range(num_rows):
        alone = sample_on(tp, logits_SV[i : i + 1], [rows[i]])
        assert (alone.token_ids[0], alone.logprobs[0]) == (together.token_ids[i], together.logprobs[i])


# -- logprobs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab_size", [8, 5_000])
def test_scores_are_the_same_bits_at_any_tp_and_the_log_softmax(vocab_size):
    logits_SV = logits_of("peaked", 12, vocab_size)
    logits_SV[5, :3] = logits_SV[5].max() + 1  # three equals on top
    token_ids = [random.randrange(vocab_size) for _ in range(12)]
    num_top = [random.randrange(21) for _ in range(12)]
    scores = [score_on(tp, logits_SV, token_ids, num_top) for tp in (1, 2, 4)]
    want = [score_whole(*one) for one in zip(logits_SV, token_ids, num_top, strict=True)]
    assert scores == [want] * 3
    for logprob_V, token_id, n, one in zip(
        logits_SV.double().log_softmax(1), token_ids, num_top, want, strict=True
    ):
        assert one.token_id == token_id
        top_C = logprob_V.argsort(descending=True, stable=True)[:n]
        assert [i for i, _ in one.top] == top_C.tolist()
        assert one.logprob == pytest.approx(float(logprob_V[token_id]), abs=1e-10)
        assert [x for _, x in one.top] == pytest.approx(logprob_V[top_C].tolist(), abs=1e-10)


def test_a_certain_token_has_logprob_0_and_an_impossible_one_a_finite_one():
    logits_SV = torch.full((1, 64), -5000.0)
    logits_SV[0, 9] = 30.0
    certain, impossible = (score_on(2, logits_SV, [token_id], [0])[0].logprob for token_id in (9, 40))
    assert (certain, math.copysign(1, certain)) == (0.0, 1.0)
    assert impossible == -5030.0


# -- what travels ------------------------------------------------------------------------------------------


class Counting(Alone):
    """A group of one that counts what it gathers."""

    def __init__(self):
        super().__init__()
        self.num_bytes = 0

    def gather_rows(self, x_tD, shares):
        self.num_bytes += x_tD.nbytes
        return super().gather_rows(x_tD, shares)


@pytest.mark.parametrize(
    ("kind", "num_bytes"),
    [
        ("greedy", 16),  # value and id
        ("noise", 16 + 24),  # and for the logprob: largest, own, sum
        ("penalties", 16 + 24 + 2 * 8),  # and 2 rivals
        ("min_p", 256 * 8),
        ("top_k", 256 * 8 + 24 + 20 * 8),
        ("top_p", 256 * 8 + 8 + 24 + 5 * 8),
    ],
)
def test_no_rank_sends_its_logits(kind, num_bytes):
    comm = Counting()
    logits_SV = logits_of("peaked", 3, 10_000)
    rows = [row(Sampling(**KINDS[kind]), i, (1, 2), (3,)) for i in range(3)]
    sample(logits_SV, rows, VocabularySlice.of(comm, 10_000))
    assert comm.num_bytes == 3 * num_bytes


def test_no_rows_send_nothing():
    comm = Counting()
    sampled = sample(torch.empty(0, 16), [], VocabularySlice.of(comm, 16))
    assert sampled.token_ids == sampled.logprobs == ()
    assert score(torch.empty(0, 16), [], [], VocabularySlice.of(comm, 16)) == []
    assert comm.num_bytes == 0


def test_a_vocabulary_that_tp_does_not_divide_is_a_bug():
    with pytest.raises(AssertionError, match="not whole"):
        VocabularySlice.of(thread_world(3, 1.0)[0], 16)


@pytest.mark.parametrize("shape", ["flat", "peaked", "ties", "equal"])
def test_what_a_device_does_without_asking_is_what_a_cpu_does(shape: str) -> None:
    """All noise for the rivals' alone, keys for logits that are looked at again if they tie."""
    logits_NV = logits_of(shape, 40, 512)
    id_V, state_N1 = torch.arange(7, 7 + 512), torch.randint(-(2**63), 2**63 - 1, (40, 1))
    for temperature in (1e-7, 0.6, 100.0):
        arguments = (bits(id_V, state_N1), logits_NV.double() / temperature)
        for found, wanted in zip(noisiest_of_all(*arguments), noisiest_of_rivals(*arguments), strict=True):
            assert torch.equal(found, wanted)
    for count in (1, 20, 511):
        assert torch.equal(highest_of_keys(logits_NV, count, id_V), highest_keys(logits_NV, count, 7))
