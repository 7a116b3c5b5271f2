"""Conversations as token ids with loss weights, in right-padded batches of like length."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor

from k2dist.demo.corpus import Conversation
from k2dist.text.chat import encode_chat
from k2dist.text.tokenizer import IM_ASSISTANT, IM_END, IM_MIDDLE, Tokenizer

CONTEXT_WEIGHT = 0.1  # of tokens that the user, the template or a tool wrote
_DRILL_TOKENS = 96
_POOL = 512  # conversations sorted by length together


class Batch(NamedTuple):
    """token_BS int64, weight_BS float32: how much the prediction of that token counts; 0 on padding."""

    token_BS: Tensor
    weight_BS: Tensor


def encode(tokenizer: Tokenizer, conversation: Conversation) -> tuple[list[int], list[float]]:
    """Ids of a whole conversation, and 1.0 for those that the assistant wrote, its `<|im_end|>` included."""
    ids = encode_chat(tokenizer, conversation.messages, conversation.tools, add_generation_prompt=False)
    assistant, middle, end = (tokenizer.special_id(name) for name in (IM_ASSISTANT, IM_MIDDLE, IM_END))
    weights: list[float] = []
    is_turn = is_body = False
    for token_id in ids:
        weights.append(1.0 if is_body else CONTEXT_WEIGHT)
        if token_id == end:
            is_turn = is_body = False
        is_turn = is_turn or token_id == assistant
        is_body = is_body or (is_turn and token_id == middle)
    return ids, weights


def drills(rng: Random, num_tokens: int, *, vocab_size: int) -> Iterator[tuple[list[int], list[float]]]:
    """Chance tokens, repeated until `num_tokens`: nothing but copying predicts them after the first time.

    Attention learns to copy within some hundred steps of these; from conversations alone it took thousands.
    """
    while True:
        part = [rng.randrange(vocab_size) for _ in range(rng.randint(4, num_tokens // 2))]
        ids = (part * (num_tokens // len(part) + 1))[:num_tokens]
        yield ids, [0.0] * (len(part) + 1) + [1.0] * (num_tokens - len(part) - 1)


def batches(
    tokenizer: Tokenizer,
    source: Iterable[Conversation],
    *,
    batch_tokens: int,
    max_tokens: int,
    drill_share: float,
    seed: int,
) -> Iterator[Batch]:
    """Batches of at most `batch_tokens` with padding; conversations over `max_tokens` are left out.

    `drill_share` of the rows are `drills`.
    """
    rng = Random(seed)
    drilled = drills(rng, _DRILL_TOKENS, vocab_size=tokenizer.num_base)
    encoded = (encode(tokenizer, conversation) for conversation in source)
    rows = (next(drilled) if rng.random() < drill_share else row for row in encoded)
    fitting = (row for row in rows if len(row[0]) <= max_tokens)
    while pool := sorted(islice(fitting, _POOL), key=lambda row: len(row[0])):
        groups: list[list[tuple[list[int], list[float]]]] = [[]]
        for row in pool:  # ascending, so the newest is the longest
            if (len(groups[-1]) + 1) * len(row[0]) > batch_tokens:
                groups.append([])
            groups[-1].append(row)
        rng.shuffle(groups)
        for group in groups:
            yield pad(group)


def pad(rows: list[tuple[list[int], list[float]]]) -> Batch:
    """One batch, every row filled up to the longest with id 0 at weight 0."""
    width = max(len(ids) for ids, _ in rows)
    token_BS = torch.zeros(len(rows), width, dtype=torch.int64)
    weight_BS = torch.zeros(len(rows), width)
    for row, (ids, weights) in enumerate(rows):
        token_BS[row, : len(ids)] = torch.tensor(ids)
        weight_BS[row, : len(ids)] = torch.tensor(weights)
    return Batch(token_BS, weight_BS)
