"""One rank's steps on its device: launched in order, one while the other still runs.

    step loop   plan 1, agree   forward 1   finish 0   sample 1   plan 2, agree   forward 2   finish 1   ...
    device      ... sample 0 ->|  forward 1 ------------->|  sample 1 --->|  forward 2 ---->

Forward and sample are launches of their own: what sampling needs of the step before, its tokens, is known by
the time it is launched, and grammar masks are made meanwhile (`masks`). The forward pass needs only the
newest token of each sequence; on a GPU it is launched as soon as these are read (`follow`).

Head and sampling are in no graph: they differ with what each request asks for. They are 50 launches where
all rows are greedy, about 80 where they are drawn (a test counts), made while the forward pass still
computes: the device waits only for the gaps between them, of 1.5 us by the planner's guess.

Steps without prompts may exchange tokens in frames of a fixed capacity. Where some rank's rows did not fit,
all ranks learn it in the pass itself, and all repeat it with the exact exchange: it writes the same places of
the cache, and nothing has been sampled of it.

Legend: S rows whose logits are wanted, D hidden width, P rows whose token the step before has sampled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from k2dist.comm import Communicator, Exchange, StepAgreement
from k2dist.engine.device_thread import DeviceThread
from k2dist.engine.follow import Follow
from k2dist.engine.form import FormRule
from k2dist.engine.forward import ForwardPass, Hidden, Model, StagedBatch
from k2dist.engine.guard import RowGuard
from k2dist.engine.readout import Outcome, PromptScore, Readout
from k2dist.engine.sequences import Sequences
from k2dist.ids import RequestId, SeqId
from k2dist.messages import StepPlan, StepResult
from k2dist.model import decoder
from k2dist.model.sampler import RowSampling, VocabularySlice
from k2dist.model.transfer import Unread, both, known


@dataclass(frozen=True, slots=True)
class Finished:
    """What a step brought, and what is wrong with each request that it spoiled or that cannot go on."""

    result: StepResult
    faults: dict[RequestId, str]
    stuck: dict[RequestId, str]  # no token that their grammar allows could be found; their numbers are right


@dataclass(slots=True)
class Step:
    """A step that was launched."""

    plan: StepPlan
    seq_ids: tuple[SeqId, ...]  # of the grants that sample, in their order
    staged: StagedBatch
    hidden: Future[Hidden]
    follow: Follow[Hidden] = field(default_factory=Follow)
    outcome: Future[tuple[dict[RequestId, str], Outcome]] | None = None
    stuck: dict[RequestId, str] = field(default_factory=dict)

    @property
    def is_replayed(self) -> bool:
        """From what was recorded of its size."""
        return self.staged.form.bucket is not None


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What a plan wants of the last hidden rows."""

    owner_S: Sequence[RequestId]
    samplings: Sequence[RowSampling]
    scores: Sequence[Sequence[PromptScore]]


class Steps:
    """See the module. Called by the step loop alone; `forward`, `sample` and `finish` once for each step."""

    def __init__(
        self,
        model: Model,
        sequences: Sequences,
        guard: RowGuard,
        lane: Communicator | None,
        exchange: Exchange,
        rule: FormRule,
        passes: ForwardPass,
        device: DeviceThread,
    ) -> None:
        self._model = model
        self._sequences = sequences
        self._guard = guard
        self._lane = lane
        self._exchange = exchange
        self._rule = rule
        self._passes = passes
        self._device = device
        # Where a launch returns before the device is done, the next step's goes first: see `follow`.
        self._leads = model.device.type != "cpu"

    def forward(self, plan: StepPlan, before: Step | None, agreed: StepAgreement) -> Step:
        """Launch the forward pass of `plan`, which the rank has applied; `before` is the step before it.

        `agreed`: what all ranks have said of this step; which collectives run depends on it alone.
        """
        staged = self._passes.stage(self._sequences.batch(plan), self._rule.form(agreed))
        rows = self._sequences.promised_rows(plan)
        seq_ids = tuple(grant.seq_id for grant in plan.grants if grant.samples)
        if rows:
            assert before is not None, "a token was promised, and no step is under way"
            places = {seq_id: place for place, seq_id in enumerate(before.seq_ids)}
            row_P, place_P = list(rows.values()), [places[seq_id] for seq_id in rows]
            work = partial(self._hidden_behind, staged, row_P, place_P)
            return Step(plan, seq_ids, staged, self._launch_behind(work, before))
        return Step(plan, seq_ids, staged, self._device.launch(partial(self._passes.run, staged)))

    def sample(self, step: Step) -> bool:
        """Launch the sampling of a step whose forward pass was launched; the step before it is finished.

        Whether that had to wait for masks.
        """
        samplings = self._sequences.row_samplings(step.plan)
        is_masked = any(row.mask is not None for row in samplings)
        is_late = is_masked and step.hidden.done() and step.hidden.result().is_done()
        step.stuck = self._sequences.grammar_errors(step.plan)
        wanted = _Wanted(
            self._sequences.row_owners(step.plan), samplings, self._sequences.prompt_scores(step.plan)
        )
        step.outcome = self._device.launch(partial(self._read_out, step, wanted))
        return is_late

    def finish(self, step: Step) -> Finished:
        """Wait for a step, and note its tokens. Raises what its launches raised."""
        assert step.outcome is not None, "it was not sampled"
        faults, outcome = step.outcome.result()
        for seq_id, token_id in zip(step.seq_ids, outcome.sampled.token_ids, strict=True):
            self._sequences.append(seq_id, token_id)
        result = StepResult(
            generation=step.plan.generation,
            step=step.plan.step,
            seq_ids=step.seq_ids,
            token_ids=outcome.sampled.token_ids,
            logprobs=outcome.sampled.logprobs,
            prompt_logprobs=outcome.prompt_logprobs,
        )
        return Finished(result, faults, step.stuck)

    def _launch_behind(self, work: Callable[[Sequence[int]], Hidden], before: Step) -> Future[Hidden]:
        """`work` needs the tokens of the step before."""
        outcome = before.outcome
        assert outcome is not None, "a step is launched before the one before it is sampled"
        following = before.follow.offer(work) if self._leads else None
        if following is not None:
            return following
        return self._device.launch(lambda: work(outcome.result()[1].sampled.token_ids))

    # -- on the device thread --------------------------------------------------------------------------

    def _hidden_behind(
        self, staged: StagedBatch, row_P: list[int], place_P: list[int], token_ids: Sequence[int]
    ) -> Hidden:
        """The forward pass of a batch, some of whose tokens are among those of the step before."""
        staged.batch.token_T[row_P] = torch.tensor([token_ids[place] for place in place_P])
        return self._passes.run(staged)

    def _read_out(self, step: Step, wanted: _Wanted) -> tuple[dict[RequestId, str], Outcome]:
        """`_read`, and then at once what follows the step."""
        try:
            faults, outcome = self._read(step, wanted)
        except BaseException:
            step.follow.close()
            raise
        step.follow.run(outcome.sampled.token_ids)
        return faults, outcome

    def _read(self, step: Step, wanted: _Wanted) -> tuple[dict[RequestId, str], Outcome]:
        """What is wrong with requests, and what the plan wants; the same on all tp ranks. Collective.

        The only read of a step, unless its frames were too small: then there is a second one.
        """
        hidden = step.hidden.result()
        unread = self._unread(hidden.x_SD, wanted)
        if hidden.has_overflowed is not None:
            found = unread.unless(hidden.has_overflowed).read(self._passes.settle)
            if found is not None:
                return found
            self._exchange.num_overflows += 1
            unread = self._unread(self._passes.exactly(step.staged).x_SD, wanted)
        return unread.read(self._passes.settle)

    def _unread(self, x_SD: Tensor, wanted: _Wanted) -> Unread[tuple[dict[RequestId, str], Outcome]]:
        model = self._model
        x_SD, judged = self._guard.check(x_SD, wanted.owner_S)
        counts = Unread((self._exchange.counts,), lambda values: self._exchange.note(values[0]))
        judged = both(judged, counts).map(lambda found: found[0])
        if self._lane is None or model.weights.lane is None:
            return both(judged, known(Outcome.nothing()))
        readout = Readout(
            head=partial(decoder.head, weights=model.weights.lane, kernels=model.kernels),
            vocabulary=VocabularySlice.of(self._lane, model.architecture.vocab_size),
            end_token_ids=model.end_token_ids,
        )
        return both(judged, readout.launch(x_SD, wanted.samplings, wanted.scores))
