"""What a rank remembers of its lane's sequences, and how a plan becomes a batch of rows.

Every tp rank of a lane keeps the same `Sequences`: plans tell it of new sequences and pages, and it appends
the tokens that it samples itself (all tp ranks sample alike). A plan comes while the step before it runs: the
token at which a grant begins may be one that this step samples, and is filled in where it is computed.

Legend: T rows of the step, R decode rows, P pages of the longest table among them, S rows that sample, then
those that score a prompt token.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from k2dist.engine.masks import Masks, RowGrammar
from k2dist.engine.readout import PromptScore
from k2dist.engine.shares import even_shares
from k2dist.ids import PageId, RequestId, SeqId
from k2dist.messages import Grant, NewSequence, Sampling, StepPlan
from k2dist.model.batch import Batch, PromptSegment
from k2dist.model.sampler import RowSampling, SeenTokens, has_penalty


@dataclass(slots=True)
class _Sequence:
    request_id: RequestId
    prompt_len: int
    tokens: list[int]
    output_index: int
    sampling: Sampling
    seen: SeenTokens | None  # where the request has penalties
    grammar: RowGrammar | None  # where it has a constraint
    pages: list[PageId] = field(default_factory=list)


class Sequences:
    """The sequences of one lane as one rank sees them. Without `masks` none may have a constraint."""

    def __init__(self, page_tokens: int, tp: int, masks: Masks | None = None) -> None:
        self._page_tokens = page_tokens
        self._tp = tp
        self._masks = masks
        self._live: dict[SeqId, _Sequence] = {}

    def __len__(self) -> int:
        return len(self._live)

    def apply(self, plan: StepPlan) -> None:
        """Forget, learn and extend as `plan` says; before its batch is built."""
        for seq_id in plan.released:
            del self._live[seq_id]
        for new in plan.new:
            self._live[new.seq_id] = self._begin(new)
        for table in plan.page_tables:
            self._live[table.seq_id].pages[table.first :] = table.pages

    def is_prompt(self, grant: Grant) -> bool:
        """Whether its rows are of the prompt, or else generated; never both."""
        return grant.start < self._live[grant.seq_id].prompt_len

    def num_pages(self, plan: StepPlan) -> int:
        """Of the longest table of a generated row of `plan`."""
        tables = (len(self._live[grant.seq_id].pages) for grant in plan.grants if not self.is_prompt(grant))
        return max(tables, default=0)

    def batch(self, plan: StepPlan) -> Batch:
        """The rows of `plan`: for each grant its positions in order, grants in the plan's order.

        A token that is not known yet is 0: see `promised_rows`.
        """
        if not plan.grants:
            return Batch.empty(self._tp)
        tokens: list[int] = []
        positions: list[int] = []
        writes: list[int] = []
        prompts: list[PromptSegment] = []
        decodes: list[tuple[int, int, list[PageId]]] = []  # row, keys visible, pages
        samples: list[int] = []
        scores: list[int] = []
        for grant in plan.grants:
            seq = self._live[grant.seq_id]
            row, end = len(tokens), grant.start + grant.num_tokens
            tokens += seq.tokens[grant.start : end] or [0]
            positions += range(grant.start, end)
            writes += (self._cache_index(seq, position) for position in range(grant.start, end))
            if self.is_prompt(grant):
                assert end <= seq.prompt_len, "a grant mixes prompt and generated positions"
                prompts.append(PromptSegment(row, grant.num_tokens, grant.start, _page_tensor(seq.pages)))
            else:
                decodes += ((row + i, grant.start + i + 1, seq.pages) for i in range(grant.num_tokens))
            if grant.samples:
                samples.append(len(tokens) - 1)
            scores += (row + position - grant.start for position in self._scoring(grant))
        num_pages = max((len(pages) for _, _, pages in decodes), default=0)
        return Batch(
            token_T=torch.tensor(tokens, dtype=torch.int64),
            position_T=torch.tensor(positions, dtype=torch.int64),
            write_T=torch.tensor(writes, dtype=torch.int64),
            shares=even_shares(len(tokens), self._tp),
            prompts=tuple(prompts),
            decode_row_R=torch.tensor([row for row, _, _ in decodes], dtype=torch.int64),
            decode_length_R=torch.tensor([length for _, length, _ in decodes], dtype=torch.int64),
            decode_page_RP=torch.tensor(
                [pages + [PageId(0)] * (num_pages - len(pages)) for _, _, pages in decodes], dtype=torch.int64
            ).reshape(len(decodes), num_pages),
            sample_S=torch.tensor(samples + scores, dtype=torch.int64),
        )

    def promised_rows(self, plan: StepPlan) -> dict[SeqId, int]:
        """Rows of `batch(plan)` whose token is the one that the step under way samples for the sequence."""
        rows: dict[SeqId, int] = {}
        row = 0
        for grant in plan.grants:
            num_unknown = grant.start + grant.num_tokens - len(self._live[grant.seq_id].tokens)
            if num_unknown > 0:
                assert num_unknown == grant.num_tokens == 1, "a grant goes beyond the token under way"
                rows[grant.seq_id] = row
            row += grant.num_tokens
        return rows

    def row_samplings(self, plan: StepPlan) -> list[RowSampling]:
        """How to sample the first rows of `batch(plan).sample_S`, in its order. No token may be promised.

        Makes the masks of those with a grammar: `grammar_errors` says which had none left to make.
        """
        grants = [grant for grant in plan.grants if grant.samples]
        grammars = [self._live[grant.seq_id].grammar for grant in grants]
        masks = [None] * len(grants) if self._masks is None else self._masks.rows(grammars)
        return [self._row_sampling(grant, mask) for grant, mask in zip(grants, masks, strict=True)]

    def grammar_errors(self, plan: StepPlan) -> dict[RequestId, str]:
        """Requests that sample in `plan` and have to end, as what they ask for cannot be enforced further."""
        sequences = (self._live[grant.seq_id] for grant in plan.grants if grant.samples)
        return {
            seq.request_id: seq.grammar.error
            for seq in sequences
            if seq.grammar is not None and seq.grammar.error
        }

    def prompt_scores(self, plan: StepPlan) -> list[list[PromptScore]]:
        """What the other rows of `batch(plan).sample_S` score, in its order: a list per scoring grant."""
        return [self._prompt_scores(grant) for grant in plan.grants if grant.scores]

    def row_owners(self, plan: StepPlan) -> list[RequestId]:
        """Whose row each of `batch(plan).sample_S` is, in its order."""
        sampling = [grant.seq_id for grant in plan.grants if grant.samples]
        scoring = [grant.seq_id for grant in plan.grants for _ in self._scoring(grant)]
        return [self._live[seq_id].request_id for seq_id in sampling + scoring]

    def append(self, seq_id: SeqId, token_id: int) -> None:
        """A token was sampled. It counts for nothing if a later plan has released the sequence."""
        seq = self._live.get(seq_id)
        if seq is None:
            return
        seq.tokens.append(token_id)
        if seq.seen is not None:
            seq.seen.counts[token_id] += 1
        if seq.grammar is not None:
            seq.grammar.advance(token_id)

    def _begin(self, new: NewSequence) -> _Sequence:
        grammar, constraint = None, new.sampling.constraint
        if constraint is not None:
            assert self._masks is not None, "a constraint, and nobody makes masks"
            grammar = self._masks.begin(constraint, new.generated)
        return _Sequence(
            request_id=new.request_id,
            prompt_len=len(new.prompt),
            tokens=[*new.prompt, *new.generated],
            output_index=new.output_index,
            sampling=new.sampling,
            seen=SeenTokens.of(new.prompt, new.generated) if has_penalty(new.sampling) else None,
            grammar=grammar,
        )

    def _scoring(self, grant: Grant) -> range:
        """Positions of the grant that have a prompt token behind them, if it scores any."""
        last = self._live[grant.seq_id].prompt_len - 1
        return range(grant.start, min(grant.start + grant.num_tokens, last) if grant.scores else grant.start)

    def _prompt_scores(self, grant: Grant) -> list[PromptScore]:
        seq = self._live[grant.seq_id]
        assert seq.sampling.prompt_logprobs is not None, "a grant scores a prompt that nobody asks about"
        num_top = seq.sampling.prompt_logprobs
        return [PromptScore(seq.tokens[position + 1], num_top) for position in self._scoring(grant)]

    def _row_sampling(self, grant: Grant, mask: torch.Tensor | None) -> RowSampling:
        seq = self._live[grant.seq_id]
        return RowSampling(
            sampling=seq.sampling,
            output_index=seq.output_index,
            position=grant.start + grant.num_tokens,  # of the token to be sampled
            num_generated=grant.start + grant.num_tokens - seq.prompt_len,
            seen=seq.seen,
            mask=mask,
        )

    def _cache_index(self, seq: _Sequence, position: int) -> int:
        page, offset = divmod(position, self._page_tokens)
        return seq.pages[page] * self._page_tokens + offset


def _page_tensor(pages: list[PageId]) -> torch.Tensor:
    return torch.tensor(pages, dtype=torch.int64)
