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
        masks = [None if grammar is None else self._mask(grammar) for grammar in grammars]
        self.num_made += sum(mask is not None for mask in masks)
        self.made_s_total += time.monotonic() - began_s
        return masks

    def _mask(self, grammar: RowGrammar) -> Tensor:
        mask_B = torch.zeros(self._num_bytes, dtype=torch.uint8)
        grammar.mask_into(mask_B[: self._grammars.mask_bytes])
        return mask_B


class RowGrammar:
    """One output's grammar on one rank. `error`: why the output has to end; its masks then allow all."""

    def __init__(self, state: Future[GrammarState]) -> None:
        self._state = state
        self.error = ""

    def advance(self, token_id: int) -> None:
        if not self.error:
            self._state.result().advance(token_id)

    def mask_into(self, mask_B: Tensor) -> None:
        try:
            state = self._state.result()
        except RequestError as error:  # it compiled where it was admitted
            self.error = str(error)
            mask_B.fill_(0xFF)
            return
        state.mask_into(mask_B.numpy())
        self.error = state.error
