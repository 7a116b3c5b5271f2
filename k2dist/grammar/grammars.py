"""Compiled grammars of one tokenizer, and a sequence's place in one."""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import llguidance
import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from k2dist.errors import RequestError
from k2dist.grammar.blame import keyword_at_fault
from k2dist.grammar.schema import UnfitError
from k2dist.grammar.write import mask_bytes, write_grammar
from k2dist.messages import CallableTool, Constraint, JsonSchema, Lark, ToolCalls
from k2dist.text.tokenizer import PATTERN, Tokenizer

# Lower than llguidance's own: the lexer's states (250,000; 0.5 kB each, for as long as the grammar is kept),
# what compiling a lexer may take (1,000,000; that is 1.4 s and 190 MB), and the grammar's size (500,000).
_MAX_LEXER_STATES = 50_000
_LEXER_FUEL = 250_000
_MAX_GRAMMAR_SIZE = 200_000
_KEPT = 128  # compiled grammars; most hold some 100 kB

_LISTING = re.compile(r"\n +\d+ \| ")  # after the message come lines of a grammar that no client wrote
_PLACE = re.compile(r"^at [0-9]+\([0-9]+\): (failed to compile JSON schema: )?")

# A slice's tokens, those that match it whole, are let through together where all of them may come; others are
# looked up one by one. llguidance's own are for the insides of JSON strings. With those for words, masks in a
# regex cost less than half with K2's vocabulary (0.21 ms to 0.09). Of bounded length they fit into bounded
# repetitions too, as of `^/[a-z0-9_./]{1,80}$`: 0.23 ms to 0.14. More of them, as for capitals, save nothing.
_SPACE, *_STRINGS = llguidance.LLTokenizer.json_slices()
_SLICES = [_SPACE, "[a-z]{1,10}", " [a-z]{1,10}", *_STRINGS]

_MAX_THREADS = 4

Mask = NDArray[np.uint8]
Renewed = Callable[[llguidance.LLMatcher], tuple[llguidance.LLMatcher, bool]]


def mask_threads(num_cores: int) -> int:
    """How many threads make masks where a rank has so many cores. On two, those of 32 outputs take 0.50 to
    0.60 ms in the mean and 1.06 at p99 by two threads, 0.73 to 0.78 and 1.39 by one."""
    return max(1, min(_MAX_THREADS, num_cores))


class GrammarState:
    """Where one output stands. Equal tokens give equal masks, on every rank and after every restart.

    `kept`: the compiled grammar, at its start. `renewed(worn)` gives one other than `worn`, and whether it is
    new. All copies of one share what its lexer has found out; when that is as much as may be, none can go on,
    and they begin again with another. What fails with a new one, fails by its own tokens alone.

    `error`: why no mask can be made any more, once that is so; all tokens are allowed then, and whoever reads
    a mask has to end the output.
    """

    def __init__(self, kept: llguidance.LLMatcher, renewed: Renewed, end_token_ids: frozenset[int]) -> None:
        self.matcher = kept.deep_copy()
        self._kept = kept
        self._renewed = renewed
        self._end_token_ids = end_token_ids
        self._token_ids: list[int] = []
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
        self._token_ids.append(token_id)
        self._has_ended = token_id in self._end_token_ids
        if not self.matcher.consume_token(token_id):
            self._begin_again(lambda: None)

    def mask_into(self, mask: Mask) -> None:
        """Set the bits of the tokens that may come next: `Grammars.mask_bytes`, contiguous.

        Releases the interpreter lock. After the end all tokens are allowed: what is sampled there is dropped.
        """
        if self.goes_on:
            self._compute(mask)
        self.finish_mask(mask)

    def finish_mask(self, mask: Mask) -> None:
        """After the matcher has made `mask`, if it goes on."""
        if self.goes_on and self.matcher.is_error():
            self._begin_again(lambda: self._compute(mask))
        if not self.goes_on:
            mask[:] = 0xFF

    def _compute(self, mask: Mask) -> None:
        self.matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)

    def _begin_again(self, act: Callable[[], None]) -> None:
        is_new = False
        while self.matcher.is_error() and not is_new:
            self._kept, is_new = self._renewed(self._kept)
            self.matcher = self._kept.deep_copy()
            self.matcher.consume_tokens(self._token_ids)
            act()
        if self.matcher.is_error():
            self.error = f"constraint: {_first_line(self.matcher.get_error())}"


class Grammars:
    """Constraints compiled for one tokenizer, the last used kept. Any thread may call.

    Making one takes 2 s and 110 MB for K2's vocabulary. `num_threads`: that make masks; the caller waits.
    """

    def __init__(self, tokenizer: Tokenizer, end_token_ids: frozenset[int], *, num_threads: int = 1) -> None:
        self._tokenizer = tokenizer
        self._end_token_ids = end_token_ids
        self._ll_tokenizer = _ll_tokenizer(tokenizer, end_token_ids)
        self._limits = llguidance.LLParserLimits(
            initial_lexer_fuel=_LEXER_FUEL,
            max_lexer_states=_MAX_LEXER_STATES,
            max_grammar_size=_MAX_GRAMMAR_SIZE,
            verbose_errors=False,
        )
        self._kept: OrderedDict[Constraint, llguidance.LLMatcher] = OrderedDict()
        self._lock = threading.Lock()
        self._executor = llguidance.LLExecutor(num_threads)

    @property
    def mask_bytes(self) -> int:
        return mask_bytes(self._tokenizer.vocab_size)

    def check(self, constraint: Constraint) -> None:
        """RequestError if it cannot be enforced; its field is the constraint's kind, or "tools"."""
        self._compiled(constraint)

    def begin(self, constraint: Constraint, generated: Iterable[int] = ()) -> GrammarState:
        """The state of an output that has these tokens so far. RequestError as `check`.

        Its next mask is made here, beside the step loop: the matcher keeps it until the next token.
        """
        renewed = partial(self._renew, constraint)
        state = GrammarState(self._compiled(constraint), renewed, self._end_token_ids)
        for token_id in generated:
            state.advance(token_id)
        if state.goes_on:
            state.matcher.compute_bitmask()
        return state

    def masks_into(self, states: Sequence[GrammarState], masks: Mask) -> None:
        """`mask_into` of each state and its row of `masks` [states, mask_bytes], in one call of the library.

        The interpreter lock is given up and taken again once and not once a state: beside a thread that
        launches small operations, 32 masks take 0.3 to 0.5 ms in the mean and not 1.7 to 2.8.
        """
        assert masks.shape == (len(states), self.mask_bytes), f"{masks.shape} for {len(states)} states"
        going_on = [(state.matcher, row) for row, state in enumerate(states) if state.goes_on]
        if going_on:
            self._executor.unsafe_compute_mask_ptr(going_on, masks.ctypes.data, self.mask_bytes, len(states))
        for state, mask in zip(states, masks, strict=True):
            state.finish_mask(mask)

    def _compiled(self, constraint: Constraint) -> llguidance.LLMatcher:
        """At its start. Two threads may compile the same one at the same time; the last is kept."""
        known = self._known(constraint)
        if known is not None:
            return known
        try:
            matcher = self._compile(constraint)
        except UnfitError as error:
            raise RequestError(_field(constraint), f"cannot be enforced: {error}") from error
        self._keep(constraint, matcher)
        return matcher

    def _renew(self, constraint: Constraint, worn: llguidance.LLMatcher) -> tuple[llguidance.LLMatcher, bool]:
        """See `GrammarState`. The step loop waits for it, some milliseconds: few grammars ever wear out."""
        known = self._known(constraint)
        if known is not None and known is not worn:
            return known, False
        matcher = self._compile(constraint)
        self._keep(constraint, matcher)
        return matcher, True

    def _known(self, constraint: Constraint) -> llguidance.LLMatcher | None:
        with self._lock:
            if constraint in self._kept:
                self._kept.move_to_end(constraint)
            return self._kept.get(constraint)

    def _keep(self, constraint: Constraint, matcher: llguidance.LLMatcher) -> None:
        with self._lock:
            self._kept[constraint] = matcher
            self._kept.move_to_end(constraint)
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)

    def _compile(self, constraint: Constraint) -> llguidance.LLMatcher:
        matcher = self._matcher(write_grammar(constraint, self._tokenizer.special_id))
        fault = _fault(matcher)
        if fault:
            raise UnfitError(self._explained(constraint, fault))
        return matcher

    def _fault(self, constraint: Constraint) -> str:
        try:
            return _fault(self._matcher(write_grammar(constraint, self._tokenizer.special_id)))
        except UnfitError as error:
            return str(error)

    def _explained(self, constraint: Constraint, fault: str) -> str:
        """`fault` and where it is, as far as that can be found out."""
        match constraint:
            case Lark():
                return fault
            case JsonSchema(schema=text):
                return self._placed(text, fault, lambda text: JsonSchema(schema=text))
            case ToolCalls(tools=tools, text=text_constraint):
                for tool in tools:
                    if own_fault := self._fault(_alone(tool)):
                        place = f"{tool.name}: parameters"
                        placed = self._placed(str(tool.parameters), own_fault, partial(_alone, tool))
                        return f"{place}: {placed}; or declare it with strict: false"
                if text_constraint is not None and (own_fault := self._fault(text_constraint)):
                    return self._explained(text_constraint, own_fault)
                return fault
            case _:
                return _PLACE.sub("", fault)

    def _placed(self, schema: str, fault: str, constrained: Callable[[str], Constraint]) -> str:
        path = keyword_at_fault(schema, fault, lambda text: bool(self._fault(constrained(text))))
        return f"{path}: {_PLACE.sub('', fault)}" if path else _PLACE.sub("", fault)

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


def _alone(tool: CallableTool, parameters: str | None = None) -> ToolCalls:
    """Calls of one tool, with its own parameters or others."""
    return ToolCalls(tools=(replace(tool, parameters=parameters or tool.parameters),), is_required=True)


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
