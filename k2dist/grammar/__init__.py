"""What an answer must be, as a set of tokens that may come next.

    Constraint ── write ──> Lark ── Grammars: compiled once ──> GrammarState: one output's place in it

A state depends on the tokens taken and on nothing else: after a preemption, or on another machine, it is
made again from them. The parser and the masks are llguidance's (github.com/guidance-ai/llguidance).

How it meets the rest of sampling:
- a token outside the mask is never sampled, whatever bias, penalties, temperature or filters say; these act
  on what the mask leaves. Logprobs are of the raw logits, as ever.
- end tokens are allowed exactly where the grammar accepts, so `min_tokens` contradicts a constraint and is
  refused with it. With `ignore_eos` a constraint holds up to the first end token, and nothing after it.
- stop strings, stop ids, max_tokens and timeouts end an answer where they meet it, also inside of JSON: with
  `max_tokens` it says LENGTH.
"""

from k2dist.grammar.grammars import Grammars, GrammarState, Mask, mask_threads
from k2dist.grammar.tools import answer_constraint
from k2dist.grammar.write import MAX_SCHEMA_BYTES, MAX_TOOLS, mask_bytes

__all__ = [
    "MAX_SCHEMA_BYTES",
    "MAX_TOOLS",
    "GrammarState",
    "Grammars",
    "Mask",
    "answer_constraint",
    "mask_bytes",
    "mask_threads",
]
