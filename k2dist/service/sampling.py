"""From what a client said about sampling to a `Sampling` in which every field has a checked value."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

from k2dist.errors import RequestError
from k2dist.messages import Message, Sampling
from k2dist.service.client_request import PartialSampling

T = TypeVar("T")

MAX_SEED = 2**64 - 1
MAX_LOGPROBS = 20
MAX_STOPS = 64
MAX_STOP_BYTES = 1024
DEFAULT_TEMPERATURE = 0.6  # Kimi-K2-Instruct's model card


class SamplingDefaults(Message, frozen=True, kw_only=True):
    """What the model's generation_config.json says for clients that say nothing."""

    temperature: float = DEFAULT_TEMPERATURE
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0


def resolve_sampling(
    said: PartialSampling,
    defaults: SamplingDefaults,
    *,
    prompt_tokens: int,
    max_positions: int,
    vocab_size: int,
    draw_seed: Callable[[], int],
) -> Sampling:
    """Every field filled and in range; RequestError names the field that is not.

    `max_tokens` left open reaches to the end of the context; asked for beyond it is an error, not a clamp.
    """
    room = max_positions - prompt_tokens
    if room < 1:
        raise RequestError(
            "prompt", f"{prompt_tokens} tokens leave no room for an answer: the context holds {max_positions}"
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
    )
    _check_numbers(resolved)
    _check_lengths(resolved, prompt_tokens, room, max_positions)
    _check_tokens(resolved, vocab_size)
    _check_stops(resolved.stop)
    return resolved


def _first(said: T | None, default: T) -> T:
    return default if said is None else said


def _check_numbers(sampling: Sampling) -> None:
    _check("temperature", sampling.temperature, 0.0, 100.0)
    _check("top_p", sampling.top_p, 0.0, 1.0, open_below=True)
    _check("top_k", sampling.top_k, 0, 2**31 - 1)
    _check("min_p", sampling.min_p, 0.0, 1.0)
    _check("repetition_penalty", sampling.repetition_penalty, 0.0, 100.0, open_below=True)
    _check("presence_penalty", sampling.presence_penalty, -2.0, 2.0)
    _check("frequency_penalty", sampling.frequency_penalty, -2.0, 2.0)
    _check("seed", sampling.seed, 0, MAX_SEED)
    if sampling.logprobs is not None:
        _check("logprobs", sampling.logprobs, 0, MAX_LOGPROBS)


def _check_lengths(sampling: Sampling, prompt_tokens: int, room: int, max_positions: int) -> None:
    _check("max_tokens", sampling.max_tokens, 1, max_positions)
    _check("min_tokens", sampling.min_tokens, 0, sampling.max_tokens)
    if sampling.max_tokens > room:
        raise RequestError(
            "sampling.max_tokens",
            f"{sampling.max_tokens} + {prompt_tokens} prompt tokens pass the context of {max_positions}; "
            f"ask for at most {room}",
        )


def _check_tokens(sampling: Sampling, vocab_size: int) -> None:
    for token_id, bias in sampling.logit_bias.items():
        _check(f"logit_bias[{token_id}]", bias, -100.0, 100.0)
        _check("logit_bias", token_id, 0, vocab_size - 1)
    for index, token_id in enumerate(sampling.stop_token_ids):
        _check(f"stop_token_ids[{index}]", token_id, 0, vocab_size - 1)


def _check_stops(stops: tuple[str, ...]) -> None:
    if len(stops) > MAX_STOPS:
        raise RequestError("sampling.stop", f"{len(stops)} strings; at most {MAX_STOPS}")
    for index, stop in enumerate(stops):
        num_bytes = len(stop.encode())
        if not 1 <= num_bytes <= MAX_STOP_BYTES:
            raise RequestError(f"sampling.stop[{index}]", f"{num_bytes} bytes; use 1 to {MAX_STOP_BYTES}")


def _check(name: str, value: float, low: float, high: float, *, open_below: bool = False) -> None:
    too_low = value <= low if open_below else value < low
    if not math.isfinite(value) or too_low or value > high:
        bracket = "(" if open_below else "["
        raise RequestError(f"sampling.{name}", f"{value} is outside {bracket}{low}, {high}]")
