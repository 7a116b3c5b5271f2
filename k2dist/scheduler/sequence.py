"""One output of one request: what is known of it, what is computed, which pages hold it, when it ends.

0            prompt_len          computed_len        known_len
|-- prompt -----|------ generated ----|---- lag ---------|
a grant moves computed_len towards known_len; when it arrives, the step samples one token more, and known_len
moves on at once: the token is promised. `generated` holds the tokens that have come.

Both lengths are as of the last plan: it and the step before may still have to run. Who is preempted takes
nothing from these: its promised tokens are computed again, and are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from k2dist.cache.prefix import PageKey, next_key, root_key
from k2dist.errors import RequestError
from k2dist.ids import PageId, RequestId, SeqId
from k2dist.messages import Course, Event, FinishReason, NewSequence, Request, TokenLogprob, Usage
from k2dist.scheduler.policy import Rank
from k2dist.text.stream import StopStrings


class End(NamedTuple):
    """Why an output ended; `stop_match` is the token id or the stop string that ended it."""

    reason: FinishReason
    stop_match: str | int | None = None
    error: str = ""


@dataclass(frozen=True, slots=True)
class EndRules:
    """What ends any sequence of this lane, besides its own sampling."""

    end_token_ids: frozenset[int]
    token_bytes: Callable[[int], bytes]
    max_positions: int


@dataclass(eq=False, slots=True, kw_only=True)
class Sequence:
    """The scheduler's state for one output. Make one with `begin`."""

    # First what every step reads, so that it lies together: thousands of these pass through a CPU's cache.
    id: SeqId
    request_id: RequestId
    output_index: int
    known_len: int  # prompt, generated and promised tokens
    stop_ids: frozenset[int]  # any of these ends it, from token number `min_tokens` (from 1) on
    max_len: int  # it ends when it knows so many tokens
    computed_len: int = field(default=0, init=False)
    held_len: int = field(default=0, init=False)  # positions that `pages` have room for; 0: it waits, or left
    is_decoding: bool = field(default=False, init=False)  # runs, one generated token behind; not catching up
    generated: list[int] = field(default_factory=list, init=False)
    end: End | None = field(default=None, init=False)
    stop_strings: StopStrings | None

    request: Request
    rules: EndRules
    rank: Rank  # orders all sequences of a lane, for good
    prompt_len: int
    pages: list[PageId] = field(default_factory=list, init=False)
    started_s: float = field(default=0.0, init=False)  # when it last began to run
    cached_len: int | None = field(
        default=None, init=False
    )  # prompt tokens that its first start found cached
    added_s: float = 0.0  # when the lane took it
    queued_s: float = field(default=0.0, init=False)  # from then until it first ran
    num_chunks: int = field(default=0, init=False)  # grants of prompt positions
    num_preemptions: int = field(default=0, init=False)
    scored_len: int = field(default=1, init=False)  # prompt tokens whose logprobs went out, and the first one
    _keys: list[PageKey] = field(default_factory=list, init=False)  # of its first full pages, if asked for

    @classmethod
    def begin(
        cls,
        seq_id: SeqId,
        request: Request,
        output_index: int,
        rank: Rank,
        rules: EndRules,
        *,
        now_s: float = 0.0,
    ) -> Sequence:
        """A sequence that knows its prompt and what an earlier lane generated; it may have ended by that."""
        sampling, prompt_len = request.sampling, len(request.prompt)
        ends: frozenset[int] = frozenset() if sampling.ignore_eos else rules.end_token_ids
        seq = cls(
            id=seq_id,
            request_id=request.request_id,
            output_index=output_index,
            known_len=prompt_len,
            stop_ids=ends.union(sampling.stop_token_ids) if sampling.stop_token_ids else ends,
            max_len=min(prompt_len + sampling.max_tokens, rules.max_positions),
            stop_strings=StopStrings(sampling.stop) if sampling.stop else None,
            request=request,
            rules=rules,
            rank=rank,
            prompt_len=prompt_len,
            added_s=now_s,
        )
        for token_idx, token_id in enumerate(request.generated.get(output_index, ())):
            if seq.end is not None:
                raise RequestError(
                    "generated", f"output {output_index} goes on after its end at token {token_idx - 1}"
                )
            seq.known_len += 1
            seq.take(token_id, None)
        return seq

    @property
    def taken_len(self) -> int:
        """Prompt and generated tokens: `known_len` without what is promised."""
        return self.prompt_len + len(self.generated)

    @property
    def lag(self) -> int:
        """Known tokens that no planned step computes; at least 1, as a new token is not computed."""
        return self.known_len - self.computed_len

    @property
    def wants_scores(self) -> bool:
        """Logprobs of prompt tokens are asked for and not all out: no position may come from a prefix hit.

        They come before the first token, so one that has tokens (recovery, preemption) has them all.
        """
        wanted = self.request.sampling.prompt_logprobs is not None
        return wanted and self.output_index == 0 and not self.generated

    @property
    def extent(self) -> int:
        """How far one grant may reach: to the end of the prompt, or from there to the end of what is known.

        A grant never mixes the two: prompt positions are computed by the prompt path and generated ones by
        the decode path, also when recomputed, so that the bits stay the same.
        """
        return self.prompt_len - self.computed_len if self.computed_len < self.prompt_len else self.lag

    def keys(self, num_pages: int, page_tokens: int) -> Iterator[PageKey]:
        """The keys of its first pages, which must be full of known tokens; hashed when asked for, once."""
        for index in range(num_pages):
            if index == len(self._keys):
                parent = self._keys[-1] if index else root_key(self.request.tenant)
                tokens = self._tokens(index * page_tokens, (index + 1) * page_tokens)
                self._keys.append(next_key(parent, tokens))
            yield self._keys[index]

    def take(self, token_id: int, logprob: TokenLogprob | None) -> Event:
        """A promised token; returns its event, and sets `end` when it ends the output.

        End tokens, the client's stop ids, stop strings, then the lengths; the first rule that holds. Before
        token number `min_tokens` (from 1) no token ends the output, and no stop string even begins
        (`text.stream.StopGate` counts alike). The ending token is part of the output; its bytes are no text.
        """
        assert self.end is None, f"sequence {self.id} got a token after its end"
        first_index = len(self.generated)
        self.generated.append(token_id)
        is_rare = token_id in self.stop_ids or self.stop_strings is not None
        if is_rare or self.prompt_len + first_index + 1 >= self.max_len:
            self.end = self._find_end(token_id)
            if self.end is not None:
                return self.event(first_index, () if logprob is None else (logprob,))
        return Event(
            request_id=self.request_id,
            output_index=self.output_index,
            first_index=first_index,
            token_ids=(token_id,),
            logprobs=() if logprob is None else (logprob,),
            course=None if first_index else self.course(),
        )

    def event(self, first_index: int, logprobs: tuple[TokenLogprob, ...] = ()) -> Event:
        """What became known from token `first_index` on, and the end, which must have come."""
        assert self.end is not None, f"sequence {self.id} goes on"
        return Event(
            request_id=self.request_id,
            output_index=self.output_index,
            first_index=first_index,
            token_ids=tuple(self.generated[first_index:]),
            logprobs=logprobs,
            finish=self.end.reason,
            stop_match=self.end.stop_match,
            usage=self.usage(),
            error=self.end.error,
            course=self.course(),
        )

    def score(self, first: int, logprobs: tuple[TokenLogprob, ...]) -> tuple[Event, ...]:
        """Logprobs of the prompt tokens from `first` on: an event with those that are not out yet, if any."""
        fresh = logprobs[max(self.scored_len - first, 0) :]
        if not fresh or self.end is not None:
            return ()
        assert first <= self.scored_len, f"sequence {self.id} lacks logprobs {self.scored_len} to {first}"
        event = Event(
            request_id=self.request_id,
            output_index=self.output_index,
            first_index=len(self.generated),
            prompt_logprobs=fresh,
            first_prompt_index=self.scored_len,
        )
        self.scored_len += len(fresh)
        return (event,)

    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=self.prompt_len,
            cached_tokens=self.cached_len or 0,
            completion_tokens=len(self.generated),
        )

    def course(self) -> Course:
        return Course(
            queued_s=self.queued_s,
            cached_tokens=self.cached_len or 0,
            num_chunks=self.num_chunks,
            num_preemptions=self.num_preemptions,
        )

    def introduction(self) -> NewSequence:
        return NewSequence(
            seq_id=self.id,
            request_id=self.request_id,
            output_index=self.output_index,
            prompt=self.request.prompt,
            generated=tuple(self.generated),
            sampling=self.request.sampling,
        )

    def _find_end(self, token_id: int) -> End | None:
        if len(self.generated) >= self.request.sampling.min_tokens:
            if token_id in self.stop_ids:
                return End(FinishReason.STOP, token_id)
            if self.stop_strings is not None:
                match = self.stop_strings.push(self.rules.token_bytes(token_id)).match
                if match is not None:
                    return End(FinishReason.STOP, match)
        return End(FinishReason.LENGTH) if self.taken_len >= self.max_len else None

    def _tokens(self, start: int, end: int) -> list[int]:
        """Known tokens [start, end)."""
        prompt_len = self.prompt_len
        own = self.generated[max(start - prompt_len, 0) : max(end - prompt_len, 0)]
        return [*self.request.prompt[start:end], *own]

    # -- invariants ------------------------------------------------------------------------------------

    def check_waiting(self) -> None:
        """Assert that it goes on, and holds nothing."""
        assert self.end is None, f"sequence {self.id} waits after its end"
        assert not self.pages, f"sequence {self.id} waits and holds pages"
        assert (self.computed_len, self.held_len) == (0, 0), f"sequence {self.id} waits and has computed"
        assert not self.is_decoding, f"sequence {self.id} waits and decodes"
        assert self.known_len == self.taken_len, f"sequence {self.id} waits and was promised a token"

    def check_running(self, page_tokens: int) -> None:
        """Assert that it goes on, and that its pages reach as far as it has computed."""
        assert self.end is None, f"sequence {self.id} runs after its end"
        assert self.pages, f"sequence {self.id} runs and holds no page"
        assert self.held_len == len(self.pages) * page_tokens, f"sequence {self.id} miscounts its pages"
        assert self.computed_len <= self.held_len, f"sequence {self.id} lacks a page"
        assert self.computed_len < self.known_len, f"sequence {self.id} computed a token nobody knows"
        assert 0 <= self.known_len - self.taken_len <= 2, f"sequence {self.id} was promised too much"
        assert self.known_len <= self.max_len, f"sequence {self.id} was promised a token after its last"
        decodes = self.computed_len >= self.prompt_len and self.lag == 1
        assert self.is_decoding == decodes, f"sequence {self.id}, decoding: {self.is_decoding}"
