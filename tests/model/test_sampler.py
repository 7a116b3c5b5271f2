"""The sampler against exact probabilities, and its filters against plain Python."""

import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from k2dist.comm import Alone, thread_world
from k2dist.messages import Sampling
from k2dist.model.sampler import RowSampling, SeenTokens, VocabularySlice
from k2dist.model.sampler import sample as sample_slice
from k2dist.model.sampler.noise import bits, gumbel, states, uniform_of


def row(sampling, position=0, output_index=0, prompt=(), generated=()):
    return RowSampling(sampling, output_index, position, len(generated), SeenTokens.of(prompt, generated))


def sample(logits_SV, rows, end_token_ids=()):
    return sample_slice(
        logits_SV, rows, VocabularySlice.whole(logits_SV.shape[1]), end_token_ids=end_token_ids
    )


def sample_on(tp, logits_SV, rows):
    """Tokens that a lane of `tp` ranks draws, each from its slice."""
    comms = thread_world(tp, 30.0) if tp > 1 else [Alone()]

    def draw(comm):
        vocabulary = VocabularySlice.of(comm, logits_SV.shape[1])
        return sample_slice(
            logits_SV[:, vocabulary.first :][:, : vocabulary.width], rows, vocabulary
        ).token_ids

    with ThreadPoolExecutor(tp) as pool:
        first, *others = pool.map(draw, comms)
    assert all(other == first for other in others)
    return first


def noise_state(seed, output_index, position):
    return states([RowSampling(Sampling(seed=seed), output_index, position)], torch.device("cpu"))


def sample_one(logits, sampling, **kwargs):
    end_token_ids = kwargs.pop("end_token_ids", ())
    logits_SV = torch.tensor([logits], dtype=torch.float32)
    sampled = sample(logits_SV, [row(sampling, **kwargs)], end_token_ids=end_token_ids)
    return sampled.token_ids[0]


def softmax(logits):
    top = max(logits)
    weights = [math.exp(x - top) for x in logits]
    return [w / math.fsum(weights) for w in weights]


# -- the distribution --------------------------------------------------------------------------------------

NUM_DRAWS = 2500
# Chi-square's 99.9% point by degrees of freedom. Seeds are fixed: a pass is a pass for ever.
CHI2 = {3: 16.27, 4: 18.47, 5: 20.52, 6: 22.46, 7: 24.32, 8: 26.12, 9: 27.88, 10: 29.59}


def chi2(counts, probabilities):
    total = sum(counts.values())
    return sum((counts[i] - total * p) ** 2 / (total * p) for i, p in enumerate(probabilities))


@pytest.mark.parametrize("counter", ["position", "output_index", "seed"])
@pytest.mark.parametrize("temperature", [0.6, 2.0])
def test_draws_follow_the_softmax_along_every_counter(counter, temperature):
    logits = [0.0, 1.0, -1.0, 2.0, 0.5, 0.5, -0.5, 1.5, 0.1, 0.9]
    rows = []
    for i in range(NUM_DRAWS):
        seed = i if counter == "seed" else 2**63 + 11
        place = {counter: i} if counter != "seed" else {}
        rows.append(row(Sampling(temperature=temperature, seed=seed), **place))
    drawn = sample(torch.tensor(logits).repeat(NUM_DRAWS, 1), rows).token_ids
    assert chi2(Counter(drawn), softmax([x / temperature for x in logits])) < CHI2[9]


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("filters", [{}, {"top_k": 8, "top_p": 0.999}], ids=["all", "filtered"])
@pytest.mark.parametrize("temperature", [0.6, 2.0])
def test_a_temperature_off_by_a_twentieth_would_show(temperature, filters, tp):
    """The mean logit drawn, against the exact one: 2,500 draws over ten tokens would miss a quarter."""
    num_draws, logits = 40_000, [-4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 2.5, 3.0, 4.0]
    sampling = Sampling(temperature=temperature, seed=9, **filters)
    left = sorted(naive_candidates(logits, sampling))

    def moments(t):
        p = softmax([logits[i] / t for i in left])
        mean = sum(x * logits[i] for x, i in zip(p, left, strict=True))
        return mean, sum(x * (logits[i] - mean) ** 2 for x, i in zip(p, left, strict=True))

    mean, variance = moments(temperature)
    sigma = math.sqrt(variance / num_draws)
    assert abs(moments(1.05 * temperature)[0] - mean) > 6 * sigma, "the test has the power"
    rows = [row(sampling, i) for i in range(num_draws)]
    drawn = sample_on(tp, torch.tensor(logits).repeat(num_draws, 1), rows)
    assert abs(sum(logits[i] for i in drawn) / num_draws - mean) < 3.3 * sigma


FILTERS = {
    "top_k": {"top_k": 6},
    "top_p": {"top_p": 0.85},
    "min_p": {"min_p": 0.31},
    "top_k, top_p": {"top_k": 9, "top_p": 0.8},
    "top_k, min_p": {"top_k": 8, "min_p": 0.41},
    "top_p, min_p": {"top_p": 0.97, "min_p": 0.41},
    "all": {"top_k": 9, "top_p": 0.96, "min_p": 0.51},
    "all, with bias and penalties": {
        "top_k": 9,
        "top_p": 0.96,
        "min_p": 0.09,
        "logit_bias": {11: 1.5, 2: -0.7},
        "repetition_penalty": 1.3,
        "presence_penalty": 0.4,
        "frequency_penalty": 0.2,
    },
}


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("name", FILTERS)
def test_filtered_draws_follow_the_softmax_of_what_is_left(name, tp):
    """Exact probabilities: of the candidates alone, renormalised."""
    sampling = Sampling(temperature=1.3, seed=77, **FILTERS[name])
    logits, prompt, generated = [math.log(1 + i) for i in range(12)], (0, 5, 11), (5, 7, 7, 7)
    adjusted = naive_adjust(logits, sampling, prompt, generated)
    left = sorted(naive_candidates(adjusted, sampling))
    assert 3 < len(left) < 12, "the filters leave some and take some"
    rows = [row(sampling, i, prompt=prompt, generated=generated) for i in range(NUM_DRAWS)]
    drawn = Counter(sample_on(tp, torch.tensor(logits).repeat(NUM_DRAWS, 1), rows))
    assert set(drawn) == set(left)
    counts = Counter({place: drawn[token_id] for place, token_id in enumerate(left)})
    probabilities = softmax([adjusted[i] / sampling.temperature for i in left])
    assert chi2(counts, probabilities) < CHI2[len(left) - 1]


def test_a_far_token_is_drawn_as_often_as_it_should():
    """A single large logit against 4,000 small ones that weigh as much together."""
    logits_V = torch.zeros(4001)
    logits_V[0] = math.log(4000.0)
    rows = [row(Sampling(temperature=1.0, seed=5), position=i) for i in range(2000)]
    hits = sample(logits_V.repeat(2000, 1), rows).token_ids.count(0)
    assert abs(hits - 1000) < 3.3 * math.sqrt(2000 * 0.25)


def test_neighbouring_places_draw_independently():
    """Pairs of tokens at positions i and i + 1 are uniform over all 25: no stream repeats its neighbour."""
    rows = [row(Sampling(temperature=1.0, seed=3), position=i) for i in range(5000)]
    drawn = sample(torch.zeros(len(rows), 5), rows).token_ids
    pairs = Counter(5 * a + b for a, b in zip(drawn[::2], drawn[1::2], strict=True))
    assert chi2(pairs, [1 / 25] * 25) < 51.18  # 24 degrees of freedom, 99.9%


def test_noise_is_splitmix64_mixed_from_the_counters():
    mask, golden = 2**64 - 1, 0x9E3779B97F4A7C15

    def mix(x):
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    # The generator's published first outputs for the state 1234567.
    assert [mix((1234567 + k * golden) & mask) for k in (1, 2)] == [6457827717110365317, 3203168211198807973]
    ids = [0, 1, 7, 163_839]
    for seed, output_index, position in ((0, 0, 0), (2**64 - 1, 3, 131_071), (-1, 3, 131_071), (12345, 0, 9)):
        state = seed & mask
        for counter in (output_index, position):
            state = mix((state + (counter + 1) * golden) & mask)
        want = [((mix((state + (i + 1) * golden) & mask) >> 12) + 0.5) / 2**52 for i in ids]
        bits_1C = bits(torch.tensor(ids), noise_state(seed, output_index, position))
        assert uniform_of(bits_1C)[0].tolist() == want


def test_noise_is_uniform_over_k2s_vocabulary_and_finite():
    ids, state_11 = torch.arange(163_840), noise_state(1, 0, 0)
    u_C = uniform_of(bits(ids, state_11))[0]
    counts = Counter((u_C * 64).long().tolist())
    assert chi2(counts, [1 / 64] * 64) < 103.4  # 63 degrees of freedom, 99.9%
    assert 0.0 < u_C.min() < u_C.max() < 1.0
    assert (2**52 - 1 + 0.5) * 2.0**-52 < 1.0  # the largest that can come
    assert gumbel(ids, state_11).isfinite().all()


# -- what a row depends on ---------------------------------------------------------------------------------


def test_a_row_does_not_depend_on_the_others():
    samplings = [
        Sampling(temperature=0.0, logprobs=3),
        Sampling(temperature=1.3, seed=9, logprobs=0),
        Sampling(temperature=0.7, seed=2, top_k=5, top_p=0.8, min_p=0.01, logprobs=20),
        Sampling(temperature=0.7, seed=2, presence_penalty=1.0, logit_bias={3: 2.0}, repetition_penalty=1.2),
    ]
    logits_SV = torch.randn(12, 300) * 3
    rows = [
        row(samplings[i % 4], position=i, output_index=i % 2, prompt=(1, 2), generated=(3, 3, 299))
        for i in range(12)
    ]
    before = logits_SV.clone()
    together = sample(logits_SV, rows)
    assert torch.equal(logits_SV, before)
    order = torch.randperm(12).tolist()
    shuffled = sample(logits_SV[order], [rows[i] for i in order])
    assert shuffled.token_ids == tuple(together.token_ids[i] for i in order)
    assert shuffled.logprobs == tuple(together.logprobs[i] for i in order)
    for i in range(12):
        alone = sample(logits_SV[i : i + 1], [rows[i]])
        assert (alone.token_ids[0], alone.logprobs[0]) == (together.token_ids[i], together.logprobs[i])


def test_no_rows():
    sampled = sample(torch.empty(0, 16), [])
    assert sampled.token_ids == sampled.logprobs == ()


def test_greedy_takes_the_largest_and_the_lower_of_equals():
    assert sample_one([0.0, 3.0, 1.0, 3.0], Sampling(temperature=0.0)) == 1
    logits_SV = torch.zeros(1, 163_840)
    logits_SV[0, [70_000, 163_839]] = 5.0
    assert sample(logits_SV, [row(Sampling(temperature=0.0))]).token_ids == (70_000,)


# -- filters -----------------------------------------------------------------------------------------------


def naive_adjust(logits, sampling, prompt, generated):
    """Bias and penalties, in plain floats."""
    adjusted = []
    for token_id, logit in enumerate(logits):
        logit += sampling.logit_bias.get(token_id, 0.0)
        if token_id in prompt or token_id in generated:
            factor = sampling.repetition_penalty
            logit = logit / factor if logit > 0 else logit * factor
        count = generated.count(token_id)
        logit -= sampling.presence_penalty * (count > 0) + sampling.frequency_penalty * count
        adjusted.append(logit)
    return adjusted


def naive_candidates(logits, sampling):
    """Ids left by the filters, in plain floats."""
    scaled = [x / sampling.temperature for x in logits]
    ids = sorted(range(len(logits)), key=lambda i: (-scaled[i], i))
    if sampling.top_k:
        ids = ids[: sampling.top_k]
    probabilities = softmax([scaled[i] for i in ids])
    kept, mass = [], 0.0
    for i, p in zip(ids, probabilities, strict=True):
        if not kept or mass < sampling.top_p:
            kept.append(i)
        mass += p
    full = softmax(scaled)
    return {i for i in kept if full[i] >= sampling.min_p * full[kept[0]] * (1 - 1e-12)}


# Halves make ties; thresholds that no sum of their exponentials meets exactly.
logit_lists = st.lists(st.integers(-4, 4).map(lambda x: x / 2), min_size=1, max_size=7)
samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.5, 1.0, 1.7]),
    top_k=st.integers(0, 9),
    top_p=st.sampled_from([0.0, 0.1234567, 0.5234567, 0.9134567, 1.0]),
    min_p=st.sampled_from([0.0, 0.0123457, 0.3123457, 1.0]),
    seed=st.integers(0, 2**64 - 1),
)


@settings(deadline=None, max_examples=300)
@given(logits=logit_lists, sampling=samplings)
@example(logits=[1.0] * 5, sampling=Sampling(temperature=1.0, top_k=2))
@example(logits=[0.0, 2.0], sampling=Sampling(temperature=1.0, top_p=0.0))
def test_draws_are_the_noisiest_of_the_candidates(logits, sampling):
    candidates = sorted(naive_candidates(logits, sampling))
    noise_C = gumbel(torch.tensor(candidates), noise_state(sampling.seed, 1, 42))[0].tolist()
    noisy = [logits[i] / sampling.temperature + g for i, g in zip(candidates, noise_C, strict=True)]
    want = candidates[noisy.index(max(noisy))]
    assert sample_one(logits, sampling, output_index=1, position=42) == want


@pytest.mark.parametrize(
    ("changes", "candidates"),
    [
        ({"top_k": 2}, {1, 3}),
        ({"top_k": 3}, {0, 1, 3}),  # of the equals 0 and 4 the lower
        ({"top_p": 0.7}, {1, 3}),  # probabilities 0.1, 0.45, 0.05, 0.3, 0.1
        ({"top_p": 0.76}, {0, 1, 3}),
        ({"min_p": 0.2}, {0, 1, 3, 4}),
        ({"top_k": 4, "min_p": 0.3}, {1, 3}),
    ],
)
def test_exactly_the_candidates_are_drawn(changes, candidates):
    logits_V = torch.tensor([0.1, 0.45, 0.05, 0.3, 0.1]).log()
    rows = [row(Sampling(temperature=1.0, **changes), position=i) for i in range(400)]
    assert set(sample(logits_V.repeat(400, 1), rows).token_ids) == candidates


# -- bias and penalties ------------------------------------------------------------------------------------


def greedy_margin(changes, *, generated=(), prompt=()):
    """Logit of token 0 less that at which greedy leaves it, found by bisection: the adjustment's effect."""
    low, high = -50.0, 50.0
    for _ in range(60):
        middle = (low + high) / 2
        chosen = sample_one(
            [2.0, middle], Sampling(temperature=0.0, **changes), generated=generated, prompt=prompt
        )
        low, high = (low, middle) if chosen == 1 else (middle, high)
    return low


@pytest.mark.parametrize(
    ("changes", "generated", "prompt", "turning_point"),
    [
        ({}, (0, 0), (0,), 2.0),
        ({"logit_bias": {0: 1.5}}, (), (), 3.5),
        ({"logit_bias": {1: 1.5, 0: 1.0}}, (), (), 1.5),
        ({"presence_penalty": 0.5}, (0, 0), (0,), 1.5),
        ({"presence_penalty": 0.5}, (), (0,), 2.0),  # the prompt does not count
        ({"frequency_penalty": 0.5}, (0, 0, 0), (), 0.5),
        ({"presence_penalty": 0.25, "frequency_penalty": -0.5}, (0, 0), (), 2.75),
        ({"repetition_penalty": 4.0}, (0, 0), (), 0.5),
        ({"repetition_penalty": 4.0}, (), (0,), 0.5),  # the prompt counts
        (
            {"repetition_penalty": 4.0, "logit_bias": {0: -4.0}},
            (0,),
            (),
            -8.0,
        ),  # a negative logit is multiplied
        ({"repetition_penalty": 2.0, "presence_penalty": 3.0}, (0,), (), -2.0),
    ],
)
def test_bias_and_penalties_move_a_logit_by_this(changes, generated, prompt, turning_point):
    assert greedy_margin(changes, generated=generated, prompt=prompt) == pytest.approx(
        turning_point, abs=1e-5
    )


def test_end_tokens_wait_for_min_tokens():
    sampling = Sampling(temperature=0.0, min_tokens=2, stop_token_ids=(1,), logit_bias={0: 90.0})
    chosen = [
        sample_one([9.0, 8.0, 7.0], sampling, generated=(2,) * n, end_token_ids=frozenset({0}))
        for n in range(3)
    ]
    assert chosen == [2, 2, 0]


# -- logprobs ----------------------------------------------------------------------------------------------


def test_logprobs_are_of_the_raw_logits():
    logits = [1.0, 3.0, 2.0, 3.0, -1.0]
    logprobs = [math.log(p) for p in softmax(logits)]
    sampling = Sampling(
        temperature=0.0, logprobs=3, logit_bias={4: 100.0}, presence_penalty=2.0, frequency_penalty=1.0
    )
    (got,) = sample(torch.tensor([logits]), [row(sampling, generated=(1, 1))]).logprobs
    assert got.token_id == 4
    assert got.logprob == pytest.approx(logprobs[4], abs=1e-12)
    assert [i for i, _ in got.top] == [1, 3, 2]  # equals by ascending id
    assert [x for _, x in got.top] == pytest.approx([logprobs[i] for i in (1, 3, 2)], abs=1e-12)


def test_logprobs_come_only_when_asked_for():
    logits_SV = torch.randn(3, 30)
    rows = [row(Sampling(temperature=0.0, logprobs=n)) for n in (None, 0, 20)]
    none, bare, full = sample(logits_SV, rows).logprobs
    assert none is None
    assert bare.top == ()
    assert len(full.top) == 20
    assert full.top[0] == (full.token_id, full.logprob)
    with pytest.raises(AssertionError, match="at most 20"):
        sample(logits_SV[:1], [row(Sampling(logprobs=21))])
