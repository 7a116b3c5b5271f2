"""The range of every number that a request carries, checked at admission: none can end a rank later."""

from __future__ import annotations

import math

from k2dist.errors import RequestError
from k2dist.messages import Request, Sampling

MAX_SEED = 2**64 - 1
MAX_LOGPROBS = 20
MAX_STOPS = 64
MAX_STOP_BYTES = 1024
_MAX_TOP_K = 2**31 - 1
_MAX_TOKENS = 2**31 - 1


def check_request(request: Request, vocab_size: int) -> None:
    """RequestError, naming the field, unless all token ids exist and the sampling is in range."""
    for index, token_id in enumerate(request.prompt):
        if not 0 <= token_id < vocab_size:
            raise RequestError("prompt", f"token id {token_id} at {index} is not in 0 to {vocab_size - 1}")
    check_sampling(request.sampling, vocab_size)


def check_sampling(sampling: Sampling, vocab_size: int) -> None:
    """RequestError, naming the field, unless every value is finite and in range."""
    _check("temperature", sampling.temperature, 0.0, 100.0)
    _check("top_p", sampling.top_p, 0.0, 1.0, open_below=True)
    _check("top_k", sampling.top_k, 0, _MAX_TOP_K)
    _check("min_p", sampling.min_p, 0.0, 1.0)
    _check("repetition_penalty", sampling.repetition_penalty, 0.0, 100.0, open_below=True)
    _check("presence_penalty", sampling.presence_penalty, -2.0, 2.0)
    _check("frequency_penalty", sampling.frequency_penalty, -2.0, 2.0)
    _check("seed", sampling.seed, 0, MAX_SEED)
    _check("max_tokens", sampling.max_tokens, 1, _MAX_TOKENS)
    _check("min_tokens", sampling.min_tokens, 0, sampling.max_tokens)
    if sampling.logprobs is not None:
        _check("logprobs", sampling.logprobs, 0, MAX_LOGPROBS)
    if sampling.prompt_logprobs is not None:
        _check("prompt_logprobs", sampling.prompt_logprobs, 0, MAX_LOGPROBS)
    for token_id, bias in sampling.logit_bias.items():
        _check("logit_bias", token_id, 0, vocab_size - 1)
        _check(f"logit_bias[{token_id}]", bias, -100.0, 100.0)
    for index, token_id in enumerate(sampling.stop_token_ids):
        _check(f"stop_token_ids[{index}]", token_id, 0, vocab_size - 1)
    _check_stops(sampling.stop)
    if sampling.constraint is not None and sampling.min_tokens:
        raise RequestError(
            "sampling.min_tokens",
            "a constraint, or tools, say where the answer may end; leave min_tokens out",
        )


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
