"""A step that is planned and not committed."""

from __future__ import annotations

from dataclasses import dataclass, field

from k2dist.ids import SeqId
from k2dist.messages import Grant, StepPlan, StepResult
from k2dist.scheduler.sequence import Sequence


@dataclass(eq=False)
class Flight:
    """Built up while a step is planned; `plan` then says what the ranks are told."""

    grants: list[Grant] = field(default_factory=list)
    sampling: list[Sequence] = field(default_factory=list)  # of each grant that samples, in their order
    seq_ids: list[SeqId] = field(default_factory=list)  # of those
    chunks: list[tuple[Sequence, Grant]] = field(default_factory=list)  # whose pages may become shared
    plan: StepPlan | None = None

    def add(self, seq: Sequence, num_tokens: int) -> None:
        """Grant a sequence its next `num_tokens` positions."""
        start = seq.computed_len
        samples = start + num_tokens == seq.known_len
        scores = seq.wants_scores and start < seq.prompt_len
        grant = Grant(seq_id=seq.id, start=start, num_tokens=num_tokens, samples=samples, scores=scores)
        self.grants.append(grant)
        self.chunks.append((seq, grant))
        seq.num_chunks += start < seq.prompt_len
        if samples:
            self.sampling.append(seq)
            self.seq_ids.append(seq.id)

    def check_result(self, result: StepResult) -> None:
        """Assert that `result` is of this step, with a token for each grant that samples."""
        assert self.plan is not None, "not planned to its end"
        planned = (self.plan.generation, self.plan.step)
        assert (result.generation, result.step) == planned, f"{result} is not of {self.plan}"
        assert list(result.seq_ids) == self.seq_ids, f"sampled {result.seq_ids}, planned {self.seq_ids}"
