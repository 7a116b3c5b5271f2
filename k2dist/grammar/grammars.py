"""Compiled grammars of one tokenizer, and a sequence's place in one."""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import llguidance
import numpy as np
from numpy.typing import NDArray

from k2dist.errors import RequestError
from k2dist.grammar.schema import UnfitError
from k2dist.grammar.write import mask_bytes, write_grammar
from k2dist.messages import Constraint, Lark, ToolCalls
from k2dist.text.tokenizer import PATTERN, Tokenizer

# llguidance's defaults but for the lexer's states (1-2 kB each, for as long as the grammar is kept) and the
# grammar's size.
_MAX_LEXER_STATES = 50_000
_MAX_GRAMMAR_SIZE = 200_000
_KEPT = 128  # compiled grammars; most hold some 100 kB

_LISTING = re.compile(r"\n +\d+ \| ")  # after the message come lines of a grammar that no client wrote
_PLACE = re.compile(r"^at [0-9]+\([0-9]+\): (failed to compile JSON schema: )?")

# A slice's tokens, those that match it whole, are let through together where all of them may come; others are
# looked up one by one. llguidance's own are for the insides of JSON strings. With the two for words, masks
# inside a regex cost a third (0.24 ms to 0.07 with K2's vocabulary), and those of 32 outputs a quarter less.
_SPACE, *_STRINGS = llguidance.LLTokenizer.json_slices()
_SLICES = [_SPACE, "[a-z]+", " [a-z]+", *_STRINGS]

Mask = NDArray[np.uint8]


class GrammarState:
    """Where one output stands. Equal tokens give equal masks, on every rank and after every restart.

    `error`: why no mask can be made any more, once that is so; all tokens are allowed then, and whoever reads
    a mask has to end the output.
    """

    def __init__(self, matcher: llguidance.LLMatcher, end_token_ids: frozenset[int]) -> None:
        self.matcher = matcher
        self._end_token_ids = end_token_ids
        self._has_ended = False
        self.error = ""

    @property
    def goes_on(self) -> bool:
        return not (self._has_ended or self.error)

    @property
    def is_accepting(self) -> bool:
        """Whether the output may end here."""
        return bool(self.matcher.is_accepting())

    def advance(self, token_id: int) -> None:
        """Take the next token of the output. What comes after an end token counts for nothing."""
        if not self.goes_on:
            return
        self._has_ended = token_id in self._end_token_ids
        if not self.matcher.consume_token(token_id):
            self._note_error()

    def mask_into(self, mask: Mask) -> None:
        """Set the bits of the tokens that may come next: `Grammars.mask_bytes`, contiguous.

        Releases the interpreter lock. After the end all tokens are allowed: what is sampled there is dropped.
        """
        if self.goes_on:
            self.matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        self.finish_mask(mask)

    def finish_mask(self, mask: Mask) -> None:
        """After the matcher has made `mask`, if it goes on."""
        if self.goes_on and self.matcher.is_error():
            self._note_error()
        if not self.goes_on:
            mask[:] = 0xFF

    def _note_error(self) -> None:
        self.error = f"constraint: {_first_line(self.matcher.get_error())}"


class Grammars:
    """Constraints compiled for one tokenizer, the last used kept. Any thread may call.

    Making one takes 2 s and 110 MB for K2's vocabulary. `num_threads`: that make masks, besides the caller's.
    """

    def __init__(self, tokenizer: Tokenizer, end_token_ids: frozenset[int], *, num_threads: int = 1) -> None:
        self._tokenizer = tokenizer
        self._end_token_ids = end_token_ids
        self._ll_tokenizer = _ll_tokenizer(tokenizer, end_token_ids)
        self._limits = llguidance.LLParserLimits(
            max_lexer_states=_MAX_LEXER_STATES, max_grammar_size=_MAX_GRAMMAR_SIZE, verbose_errors=False
        )
        self._kept: OrderedDict[Constraint, llguidance.LLMatcher] = OrderedDict()
        self._lock = threading.Lock()
        self._executor = llguidance.LLExecutor(num_threads) if num_threads > 1 else None

    @property
    def mask_bytes(self) -> int:
        return mask_bytes(self._tokenizer.vocab_size)

    def check(self, constraint: Constraint) -> None:
        """RequestError if it cannot be enforced; its field is the constraint's kind, or "tools"."""
        self._compiled(constraint)

    def begin(self, constraint: Constraint, generated: Iterable[int] = ()) -> GrammarState:
        """The state of an output that has these tokens so far. RequestError as `check`."""
        state = GrammarState(self._compiled(constraint).deep_copy(), self._end_token_ids)
        for token_id in generated:
            state.advance(token_id)
        return state

    def masks_into(self, states: Sequence[GrammarState], masks: Mask) -> None:
        """`mask_into` of each state and its row of `masks` [states, mask_bytes], by several threads."""
        assert masks.shape == (len(states), self.mask_bytes), f"{masks.shape} for {len(states)} states"
        if self._executor is not None and len(states) > 1:
            going_on = [(state.matcher, row) for row, state in enumerate(states) if state.goes_on]
            self._executor.unsafe_compute_mask_ptr(going_on, masks.ctypes.data, self.mask_bytes, len(states))
            for state, mask in zip(states, masks, strict=True):
                state.finish_mask(mask)
        else:
            for state, mask in zip(states, masks, strict=True):
                state.mask_into(mask)

    def _compiled(self, constraint: Constraint) -> llguidance.LLMatcher:
        """At its start. Two threads may compile the same one at the same time; the first is kept."""
        with self._lock:
            known = self._kept.get(constraint)
            if known is not None:
                self._kept.move_to_end(constraint)
                return known
        try:
            matcher = self._compile(constraint)
        except UnfitError as error:
            raise RequestError(_field(constraint), f"cannot be enforced: {error}") from error
        with self._lock:
            self._kept.setdefault(constraint, matcher)
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return matcher

    def _compile(self, constraint: Constraint) -> llguidance.LLMatcher:
        matcher = self._matcher(write_grammar(constraint, self._tokenizer.special_id))
        fault = _fault(matcher)
        if fault and isinstance(constraint, ToolCalls):
            fault = self._tool_at_fault(constraint) or fault
        if fault:
            raise UnfitError(fault if isinstance(constraint, Lark) else _PLACE.sub("", fault))
        return matcher

    def _tool_at_fault(self, calls: ToolCalls) -> str:
        """Which tool cannot be enforced by itself, and why; or empty."""
        for tool in calls.tools:
            alone = ToolCalls(tools=(tool,), is_required=True)
            fault = _fault(self._matcher(write_grammar(alone, self._tokenizer.special_id)))
            if fault:
                return f"{tool.name}: parameters: {_PLACE.sub('', fault)}; or declare it with strict: false"
        return ""

    def _matcher(self, grammar: str) -> llguidance.LLMatcher:
        return llguidance.LLMatcher(self._ll_tokenizer, grammar, log_level=0, limits=self._limits)


def _ll_tokenizer(tokenizer: Tokenizer, end_token_ids: frozenset[int]) -> llguidance.LLTokenizer:
    """Of the same ids. It spells out bytes that are certain as the tokenizer would, not in any other way."""
    base, every = range(tokenizer.num_base), range(tokenizer.vocab_size)
    from_tiktoken = llguidance.LLTokenizer.from_tiktoken  # type: ignore[attr-defined]  # not in its stubs
    made: llguidance.LLTokenizer = from_tiktoken(
        encoder={tokenizer.token_bytes(token_id): token_id for token_id in base},
        special_tokens={tokenizer.token_bytes(i).decode(): i for i in every[tokenizer.num_base :]},
        pattern=PATTERN,
        eos_token=sorted(end_token_ids & set(every)),
        n_vocab=tokenizer.vocab_size,
        slices=_SLICES,
    )
    return made


def _fault(matcher: llguidance.LLMatcher) -> str:
    """Why a new grammar is of no use; empty if it is. Its first mask shows whether anything satisfies it,
    and leaves behind what copies would else have to find out again."""
    if not matcher.is_error():
        matcher.compute_bitmask()
        return "nothing satisfies it" if matcher.is_error() else "; ".join(matcher.get_grammar_warnings())
    message = " ".join(_LISTING.split(matcher.get_error())[0].split())
    return f"{message} (pattern)" if "regex parse error" in message else message


def _field(constraint: Constraint) -> str:
    return "tools" if isinstance(constraint, ToolCalls) else str(type(constraint).__struct_config__.tag)


def _first_line(text: str) -> str:
    return text.partition("\n")[0]
