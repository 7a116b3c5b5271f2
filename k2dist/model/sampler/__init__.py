"""One token from each row of logits, and logprobs, without any rank seeing a whole row.

    bias, penalties, end ids held back ── greedy: the largest
                                       ├─ / temperature + noise: the largest
                                       └─ top-k, of those top-p, of those min-p ── / temperature + noise

Adding Gumbel noise and taking the largest draws from the softmax (Maddison et al. 2014, arXiv:1411.0030,
section 2). The noise of a token is a function of (seed, output_index, position, token id) alone, so a token
depends on no batch, lane, preemption or restart, and tp ranks draw alike. Ties go to the lower token id.

Each tp rank works on its columns of the logits and exchanges little: its best token, its likeliest few, sums.
Sums of probabilities run in whole numbers (`mass`), so neither their order nor the cut of the vocabulary can
change a bit: `twin`, which sees whole rows and takes them one by one, gives the same tokens and logprobs.
Nothing waits for the device: `launch_sample` and `launch_score` give what is to be read with all else that a
step has to tell. Only rows whose filters leave more than a few candidates are looked at again.

Legend of all files: S rows (N, n: some of them), V vocabulary, v this rank's columns, C candidates, r ranks.
"""

from k2dist.model.sampler.rows import RowSampling, Sampled, SeenTokens, has_penalty
from k2dist.model.sampler.sample import launch_sample, sample
from k2dist.model.sampler.score import launch_score, score
from k2dist.model.sampler.vocabulary import VocabularySlice

__all__ = [
    "RowSampling",
    "Sampled",
    "SeenTokens",
    "VocabularySlice",
    "has_penalty",
    "launch_sample",
    "launch_score",
    "sample",
    "score",
]
