"""What the service knows of the model that it serves: limits, end tokens, defaults for sampling."""

from __future__ import annotations

from k2dist.config.generation_config import SamplingDefaults
from k2dist.messages import Message


class ServedModel(Message, frozen=True, kw_only=True):
    """`max_positions` bounds prompt and answer together: its context, or less where pages are fewer."""

    name: str
    max_positions: int
    holder: str  # what it is that holds so many, for whoever asks for more
    vocab_size: int
    end_token_ids: frozenset[int]
    defaults: SamplingDefaults
