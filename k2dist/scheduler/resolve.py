"""From what a client said about sampling to a `Sampling` in which every field has a checked value."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import msgspec

from k2dist.config.generation_config import SamplingDefaults
from k2dist.errors import RequestError
from k2dist.messages import Constraint, Message, Sampling
from k2dist.scheduler.bounds import check_sampling

T = TypeVar("T")


class PartialSampling(Message, frozen=True, kw_only=True):
    """`messages.Sampling` as a client gives it: None where it said nothing."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[int, float] = msgspec.field(default_factory=dict)
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    constraint: Constraint | None = None  # of the text; a conversation's tools join it


def resolve_sampling(
    said: PartialSampling,
    defaults: SamplingDefaults,
    *,
    prompt_tokens: int,
    max_positions: int,
    holder: str = "the context",
    vocab_size: int,
    draw_seed: Callable[[], int],
) -> Sampling:
    """Every field filled and in range; RequestError names the field that is not.

    `max_tokens` left open reaches to the end of the context; asked for beyond it is an error, not a clamp.
    `holder`: what bounds prompt and answer together to `max_positions` tokens.
    """
    room = max_positions - prompt_tokens
    if room < 1:
        raise RequestError(
            "prompt", f"{prompt_tokens} tokens leave no room for an answer: {holder} holds {max_positions}"
        )
    resolved = Sampling(
        temperature=_first(said.temperature, defaults.temperature),
        top_p=_first(said.top_p, defaults.top_p),
        top_k=_first(said.top_k, defaults.top_k),
        min_p=_first(said.min_p, 0.0),
        repetition_penalty=_first(said.repetition_penalty, defaults.repetition_penalty),
        presence_penalty=_first(said.presence_penalty, 0.0),
        frequency_penalty=_first(said.frequency_penalty, 0.0),
        logit_bias=said.logit_bias,
        seed=said.seed if said.seed is not None else draw_seed(),
        max_tokens=_first(said.max_tokens, room),
        min_tokens=_first(said.min_tokens, 0),
        stop=said.stop,
        stop_token_ids=said.stop_token_ids,
        ignore_eos=_first(said.ignore_eos, False),
        logprobs=said.logprobs,
        prompt_logprobs=said.prompt_logprobs,
        constraint=said.constraint,
    )
    check_sampling(resolved, vocab_size)
    if resolved.max_tokens > room:
        raise RequestError(
            "sampling.max_tokens",
            f"{resolved.max_tokens} + {prompt_tokens} prompt tokens are too many: {holder} holds "
            f"{max_positions}; ask for at most {room}",
        )
    return resolved


def _first(said: T | None, default: T) -> T:
    return default if said is None else said
