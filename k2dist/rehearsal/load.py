"""What the rehearsed lane is asked in every step: so many sequences that decode, and a prompt beside them."""

from __future__ import annotations

from collections.abc import Iterator

from k2dist.ids import Generation, PageId, RequestId, SeqId
from k2dist.messages import Grant, Message, NewSequence, PageTable, Sampling, StepPlan
from k2dist.planner.work import LaneWork

_TOKEN_STRIDE = 7919  # a prime: neighbouring rows have tokens far from each other


class Load(Message, frozen=True, kw_only=True):
    """One lane's; all lanes have alike. `num_steps` in all, warm-up included."""

    decode: int  # sequences, each one row a step
    context: int  # keys that a decode row sees in the first step; one more in each later one
    prompt_tokens: int  # rows of one prompt, another in each step, from its beginning on; 0: none
    num_steps: int
    skew: float = 0.0  # of peers' choices of experts: see `peers`

    @property
    def num_rows(self) -> int:
        return self.decode + self.prompt_tokens

    @property
    def num_samples(self) -> int:
        return self.decode + min(self.prompt_tokens, 1)

    def num_pages(self, page_tokens: int) -> int:
        """For all sequences up to the last step."""
        return self.decode * self._decode_pages(page_tokens) + -(-self.prompt_tokens // page_tokens)

    def work(self, own_rows: int) -> LaneWork:
        """Of the middle step."""
        return LaneWork(
            num_rows=self.num_rows,
            own_rows=own_rows,
            decode_rows=self.decode,
            num_keys=self.context + self.num_steps // 2,
            prompt_rows=self.prompt_tokens,
        )

    def plans(self, page_tokens: int, vocab_size: int) -> Iterator[StepPlan]:
        """`num_steps` of them."""
        tables = tuple(self._decode_table(index, page_tokens) for index in range(self.decode))
        news = tuple(self._decoding(index, vocab_size) for index in range(self.decode))
        first_page = self.decode * self._decode_pages(page_tokens)
        prompt_pages = tuple(map(PageId, range(first_page, self.num_pages(page_tokens))))
        for step in range(self.num_steps):
            start = self.context - 1 + step
            grants = tuple(
                Grant(seq_id=SeqId(index), start=start, num_tokens=1, samples=True)
                for index in range(self.decode)
            )
            is_first, prompt_id = step == 0, SeqId(self.decode + step)
            plan = StepPlan(
                generation=Generation(0),
                step=step,
                new=news if is_first else (),
                page_tables=tables if is_first else (),
                grants=grants,
            )
            yield (
                plan
                if not self.prompt_tokens
                else self._with_prompt(plan, prompt_id, prompt_pages, vocab_size, is_first=is_first)
            )

    def _with_prompt(
        self,
        plan: StepPlan,
        seq_id: SeqId,
        pages: tuple[PageId, ...],
        vocab_size: int,
        *,
        is_first: bool,
    ) -> StepPlan:
        """A prompt of its own, in the pages of the one before it."""
        num_tokens = self.prompt_tokens
        grant = Grant(seq_id=seq_id, start=0, num_tokens=num_tokens, samples=True)
        return StepPlan(
            generation=plan.generation,
            step=plan.step,
            new=(*plan.new, _new(seq_id, _tokens(seq_id, num_tokens, vocab_size), ())),
            page_tables=(*plan.page_tables, PageTable(seq_id=seq_id, first=0, pages=pages)),
            grants=(*plan.grants, grant),
            released=() if is_first else (SeqId(seq_id - 1),),
        )

    def _decoding(self, index: int, vocab_size: int) -> NewSequence:
        """All but its last token are in the cache."""
        tokens = _tokens(index, self.context, vocab_size)
        return _new(SeqId(index), tokens[:-1], tokens[-1:])

    def _decode_table(self, index: int, page_tokens: int) -> PageTable:
        count = self._decode_pages(page_tokens)
        pages = tuple(map(PageId, range(index * count, (index + 1) * count)))
        return PageTable(seq_id=SeqId(index), first=0, pages=pages)

    def _decode_pages(self, page_tokens: int) -> int:
        return -(-(self.context + self.num_steps) // page_tokens)


def _new(seq_id: SeqId, prompt: tuple[int, ...], generated: tuple[int, ...]) -> NewSequence:
    return NewSequence(
        seq_id=seq_id,
        request_id=RequestId(f"rehearsal-{seq_id}"),
        output_index=0,
        prompt=prompt,
        generated=generated,
        sampling=Sampling(ignore_eos=True, seed=seq_id),
    )


def _tokens(seed: int, num_tokens: int, vocab_size: int) -> tuple[int, ...]:
    return tuple((_TOKEN_STRIDE * (1000 * seed + i) + i * i) % vocab_size for i in range(num_tokens))
