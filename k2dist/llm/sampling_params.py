"""How to sample, as a user of `LLM` says it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import msgspec

from k2dist.config.generation_config import SamplingDefaults
from k2dist.errors import RequestError
from k2dist.llm.faults import type_fault
from k2dist.messages import Message
from k2dist.scheduler import PartialSampling, resolve_sampling

_ANY = 2**31  # a context and a vocabulary that no model exceeds: the model's own bounds are checked later


class SamplingParams(Message, frozen=True, kw_only=True):
    """What is None is the model's default (generation_config.json), as in the service.

    RequestError, naming the field, for a value that no model could take; ids and lengths are checked against
    the model when a prompt is run, and then only that prompt fails.
    """

    n: int = 1  # outputs per prompt; they differ in their noise alone
    temperature: float | None = None  # 0: greedy
    top_p: float | None = None
    top_k: int | None = None  # 0: all
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[int, float] = {}  # by token id, added to the logits
    seed: int | None = None  # 64 bits; None: drawn for each prompt, see `LLM`
    max_tokens: int | None = None  # None: to the end of the context
    min_tokens: int | None = None  # before so many nothing but max_tokens ends an output
    stop: str | Sequence[str] = ()  # strings that end an output, and are no part of its text
    stop_token_ids: Sequence[int] = ()  # besides the model's end tokens
    ignore_eos: bool | None = None
    logprobs: int | None = None  # n: of each token, and of the n likeliest beside it
    prompt_logprobs: int | None = None  # the same of the prompt's tokens but the first
    timeout_s: float | None = None  # an output that runs longer, once a lane has it, ends with "timeout"

    def __post_init__(self) -> None:
        if type(self.n) is not int or self.n < 1:
            raise RequestError("sampling.n", f"{self.n!r}: ask for at least 1 output")
        if self.timeout_s is not None and not _is_time(self.timeout_s):
            raise RequestError("sampling.timeout_s", f"{self.timeout_s!r}: use a number of seconds above 0")
        resolve_sampling(
            self.partial(),
            SamplingDefaults(),
            prompt_tokens=1,
            max_positions=_ANY,
            vocab_size=_ANY,
            draw_seed=lambda: 0,
        )

    def partial(self) -> PartialSampling:
        """What the service is told for the same; RequestError for a value of the wrong type."""
        said = {name: getattr(self, name) for name in PartialSampling.__struct_fields__}
        if isinstance(self.stop, str):
            said["stop"] = (self.stop,)
        try:
            return msgspec.convert(said, PartialSampling)
        except msgspec.ValidationError as error:
            raise type_fault("sampling", error) from error


def _is_time(value: object) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and 0 < value < math.inf  # type: ignore[operator]
