"""Grammar masks of a rank's rows: compiled aside, made on the host while the device computes the same step.

    step loop   plan: begin ......... forward launched, finish the step before: advance ... sample: rows
    own thread          compile, take known tokens ──────────────> state
    device              ... forward of this step ─────────────────────────────────────────> mask, sample

Every tp rank makes the same masks from the same tokens. A mask that comes after its forward pass is done, for
whatever reason, is late: only sampling waits, and it is counted.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from k2dist.errors import RequestError
from k2dist.grammar import Grammars, GrammarState, mask_bytes
from k2dist.messages import Constraint


class Masks:
    """`vocab_size`: of the model's logits, which may have more columns than the tokenizer has ids."""

    def __init__(self, grammars: Grammars, vocab_size: int) -> None:
        self._grammars = grammars
        self._num_bytes = mask_bytes(vocab_size)
        self._compiler = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self.num_made = 0
        self.made_s_total = 0.0

    def begin(self, constraint: Constraint, generated: Sequence[int]) -> RowGrammar:
        """The grammar of an output that has these tokens; at once, though it may not be compiled yet."""
        return RowGrammar(self._compiler.submit(self._grammars.begin, constraint, generated))

    def rows(self, grammars: Sequence[RowGrammar | None]) -> list[Tensor | None]:
        """The mask of each row's next token (see `RowSampling.mask`); waits for what is being compiled."""
        began_s = time.monotonic()
        masked = [grammar for grammar in grammars if grammar is not None]
        if not masked:
            return [None] * len(grammars)
        mask_NB = torch.zeros(len(masked), self._num_bytes, dtype=torch.uint8)
        started = [
            (row, state) for row, grammar in enumerate(masked) if (state := grammar.state()) is not None
        ]
        made_NB = torch.empty(len(started), self._grammars.mask_bytes, dtype=torch.uint8)
        self._grammars.masks_into([state for _, state in started], made_NB.numpy())
        mask_NB[[row for row, _ in started], : made_NB.shape[1]] = made_NB
        mask_NB[[row for row, grammar in enumerate(masked) if grammar.error]] = 0xFF
        self.num_made += len(masked)
        self.made_s_total += time.monotonic() - began_s
        rows = iter(mask_NB)
        return [None if grammar is None else next(rows) for grammar in grammars]


class RowGrammar:
    """One output's grammar on one rank."""

    def __init__(self, state: Future[GrammarState]) -> None:
        self._state = state
        self._refusal = ""

    @property
    def error(self) -> str:
        """Why the output has to end, once it has been asked for a mask; its masks then allow all."""
        return self._refusal or self._state.result().error

    def advance(self, token_id: int) -> None:
        state = self.state()
        if state is not None:
            state.advance(token_id)

    def state(self) -> GrammarState | None:
        """None where it does not compile: but it did where it was admitted."""
        try:
            return self._state.result()
        except RequestError as error:
            self._refusal = str(error)
            return None
