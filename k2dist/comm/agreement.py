"""What all ranks settle before a step: everything that decides which collectives run, and nothing else.

Each rank says what it knows; `combine` is a pure rule; the row of integers travels in one exchange.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import msgspec

from k2dist.comm.communicator import Communicator
from k2dist.errors import PeerError
from k2dist.ids import Generation
from k2dist.messages import Message


class StepAgreement(Message, frozen=True, kw_only=True):
    """One rank's word on the coming step, or that of all ranks. In brackets: how `combine` joins them."""

    generation: Generation  # [equal]
    step: int  # [equal]
    num_rows: int  # rows of this rank's lane [the most]; 0 on all: no forward pass
    is_idle: bool  # nothing to do now or later [all]: then every rank sleeps until its doorbell rings
    # This rank wants to leave [any]: a step needs every rank, so when one leaves all do.
    is_stopping: bool
    # Rows of this lane are prompt rows, or decode rows [any]: lanes run prompts on the same steps.
    has_prompts: bool = False
    has_decodes: bool = False
    num_pages: int = 0  # of the longest table of a decode row [the most]


def agree(comm: Communicator, mine: StepAgreement) -> StepAgreement:
    """The word of all ranks, the same on each. Collective; `comm` is the group of all world ranks.

    Errors: PeerError, naming the ranks that are at another step or generation than most.
    """
    return combine([_decode(row) for row in comm.exchange_ints(_encode(mine))])


def combine(by_rank: Sequence[StepAgreement]) -> StepAgreement:
    """Join every rank's word, given in rank order. Errors as `agree`."""
    places = [(word.generation, word.step) for word in by_rank]
    # Ties go to the lowest rank: most_common keeps the order of first appearance.
    (generation, step), _ = Counter(places).most_common(1)[0]
    astray = {rank: place for rank, place in enumerate(places) if place != (generation, step)}
    if astray:
        told = ", ".join(f"rank {rank} is at generation {g} step {s}" for rank, (g, s) in astray.items())
        raise PeerError(f"{told}; most are at generation {generation} step {step}", tuple(astray))
    return StepAgreement(
        generation=generation,
        step=step,
        num_rows=max(word.num_rows for word in by_rank),
        is_idle=all(word.is_idle for word in by_rank),
        is_stopping=any(word.is_stopping for word in by_rank),
        has_prompts=any(word.has_prompts for word in by_rank),
        has_decodes=any(word.has_decodes for word in by_rank),
        num_pages=max(word.num_pages for word in by_rank),
    )


def _encode(word: StepAgreement) -> list[int]:
    return [int(getattr(word, name)) for name in StepAgreement.__struct_fields__]


def _decode(row: Sequence[int]) -> StepAgreement:
    named = dict(zip(StepAgreement.__struct_fields__, row, strict=True))
    return msgspec.convert(named, StepAgreement, strict=False)
