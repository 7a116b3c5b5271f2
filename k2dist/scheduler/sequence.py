"""One output of one request: what is known of it, what is computed, which pages hold it, when it ends.

0            prompt_len          computed_len        known_len
|-- prompt -----|------ generated ----|---- lag ---------|
positions below computed_len are in the cache; a grant moves computed_len towards known_len;
when it arrives, the step samples the token at position known_len.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from k2dist.errors import RequestError
from k2dist.ids import PageId, SeqId
from k2dist.messages import Event, FinishReason, NewSequence, Request, TokenLogprob, Usage
from k2dist.text.stream import StopStrings


class End(NamedTuple):
    """Why an output ended; `stop_match` is the token id or the stop string that ended it."""

    reason: FinishReason
    stop_match: str | int | None = None


@dataclass(frozen=True, slots=True)
class EndRules:
    """What ends any sequence of this lane, besides its own sampling."""

    end_token_ids: frozenset[int]
    token_bytes: Callable[[int], bytes]
    max_positions: int


@dataclass(eq=False, slots=True)
class Sequence:
    """The scheduler's state for one output. `arrival` orders all sequences of a lane, for good."""

    id: SeqId
    request: Request
    output_index: int
    arrival: int
    rules: EndRules
    generated: list[int] = field(default_factory=list)
    computed_len: int = 0
    pages: list[PageId] = field(default_factory=list)
    num_pages_told: int = 0  # how many of `pages` the ranks have been told
    is_known: bool = False  # to the ranks: `NewSequence` went out, `released` did not
    end: End | None = None
    _stop_strings: StopStrings | None = None

    @classmethod
    def begin(
        cls, seq_id: SeqId, request: Request, output_index: int, arrival: int, rules: EndRules
    ) -> Sequence:
        """A sequence that knows its prompt and what an earlier lane generated; it may have ended by that."""
        seq = cls(seq_id, request, output_index, arrival, rules)
        if request.sampling.stop:
            seq._stop_strings = StopStrings(request.sampling.stop)
        for token_idx, token_id in enumerate(request.generated.get(output_index, ())):
            if seq.end is not None:
                raise RequestError(
                    "generated", f"output {output_index} goes on after its end at token {token_idx - 1}"
                )
            seq.append(token_id)
        return seq

    @property
    def prompt_len(self) -> int:
        return len(self.request.prompt)

    @property
    def known_len(self) -> int:
        return len(self.request.prompt) + len(self.generated)

    @property
    def lag(self) -> int:
        """Known tokens that are not computed; at least 1 between steps, as a new token is not computed."""
        return self.known_len - self.computed_len

    @property
    def is_decoding(self) -> bool:
        """One generated token behind; otherwise it is catching up on its prompt or on lost pages."""
        return self.computed_len >= self.prompt_len and self.lag == 1

    @property
    def extent(self) -> int:
        """How far one grant may reach: to the end of the prompt, or from there to the end of what is known.

        A grant never mixes the two: prompt positions are computed by the prompt path and generated ones by
        the decode path, also when recomputed, so that the bits stay the same.
        """
        return self.prompt_len - self.computed_len if self.computed_len < self.prompt_len else self.lag

    def append(self, token_id: int) -> None:
        """The next generated token; sets `end` when it ends the output. The ending token is part of it."""
        assert self.end is None, f"sequence {self.id} got a token after its end"
        self.generated.append(token_id)
        self.end = self._find_end(token_id)

    def event(self, first_index: int, logprobs: tuple[TokenLogprob, ...] = ()) -> Event:
        """What became known from token `first_index` on, and the end if there is one."""
        end = self.end
        return Event(
            request_id=self.request.request_id,
            output_index=self.output_index,
            first_index=first_index,
            token_ids=tuple(self.generated[first_index:]),
            logprobs=logprobs,
            finish=end.reason if end else None,
            stop_match=end.stop_match if end else None,
            usage=self.usage() if end else None,
        )

    def usage(self) -> Usage:
        return Usage(prompt_tokens=self.prompt_len, completion_tokens=len(self.generated))

    def introduction(self) -> NewSequence:
        return NewSequence(
            seq_id=self.id,
            request_id=self.request.request_id,
            output_index=self.output_index,
            prompt=self.request.prompt,
            generated=tuple(self.generated),
            sampling=self.request.sampling,
        )

    def _find_end(self, token_id: int) -> End | None:
        """End tokens, the client's stop ids, stop strings, then the lengths; the first rule that holds.

        Before token number `min_tokens` (from 1) no token ends the output, and no stop string even begins
        (`text.stream.StopGate` counts alike). A stop token's bytes are no text.
        """
        sampling = self.request.sampling
        may_stop = len(self.generated) >= sampling.min_tokens
        ends = token_id in self.rules.end_token_ids and not sampling.ignore_eos
        if may_stop and (ends or token_id in sampling.stop_token_ids):
            return End(FinishReason.STOP, token_id)
        if may_stop and self._stop_strings is not None:
            match = self._stop_strings.push(self.rules.token_bytes(token_id)).match
            if match is not None:
                return End(FinishReason.STOP, match)
        if len(self.generated) >= sampling.max_tokens or self.known_len >= self.rules.max_positions:
            return End(FinishReason.LENGTH)
        return None
