"""One rank's steps on its device: launched in order, one while the other still runs.

    step loop   plan 1, agree   forward 1   finish 0   sample 1   plan 2, agree   forward 2   finish 1   ...
    device      ... sample 0 ->|  forward 1 ------------->|  sample 1 --->|  forward 2 ---->

Forward and sample are launches of their own: what sampling needs of the step before, its tokens, is known by
the time it is launched, and grammar masks are made meanwhile (`masks`). The forward pass needs only the
newest token of each sequence, and takes it on the device.

Steps without prompts may exchange tokens in frames of a fixed capacity. Where some rank's rows did not fit,
all ranks learn it in the pass itself, and all repeat it with the exact exchange: it writes the same places of
the cache, and nothing has been sampled of it.

Legend: S rows whose logits are wanted, D hidden width, P rows whose token the step before has sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial

import torch
from k2kernels import KernelSet
from torch import Tensor

from k2dist.comm import (
    Capacity,
    CapacityRule,
    Communicator,
    Exchange,
    PaddedExchange,
    StepAgreement,
    TokenExchange,
)
from k2dist.config import Architecture
from k2dist.engine.device_thread import DeviceThread
from k2dist.engine.guard import RowGuard
from k2dist.engine.readout import Outcome, PromptScore, Readout
from k2dist.engine.sequences import Sequences, even_shares
from k2dist.ids import RequestId, SeqId
from k2dist.messages import StepPlan, StepResult
from k2dist.model import decoder
from k2dist.model.batch import Batch
from k2dist.model.latent_cache import LatentCache
from k2dist.model.sampler import RowSampling, VocabularySlice
from k2dist.model.transfer import both
from k2dist.model.weights import Weights


@dataclass(frozen=True, slots=True)
class Model:
    """What a rank computes with, in every generation. `cache` is None on a rank without a lane."""

    weights: Weights
    cache: LatentCache | None
    architecture: Architecture
    kernels: KernelSet
    tp: int  # ranks of each lane
    end_token_ids: frozenset[int]


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
    hidden_SD: Future[Tensor]
    outcome: Future[tuple[Outcome, dict[RequestId, str]]] | None = None
    stuck: dict[RequestId, str] = field(default_factory=dict)


class Steps:
    """See the module. Called by the step loop alone; `forward`, `sample` and `finish` once for each step."""

    def __init__(
        self,
        model: Model,
        sequences: Sequences,
        guard: RowGuard,
        lane: Communicator | None,
        exchange: Exchange,
        padding: CapacityRule | None,
        device: DeviceThread,
    ) -> None:
        """`padding`: of the exchange in steps without prompts; None: exact in all."""
        self._model = model
        self._sequences = sequences
        self._guard = guard
        self._lane = lane
        self._exchange = exchange
        self._padding = padding
        self._device = device

    def forward(self, plan: StepPlan, before: Step | None, agreed: StepAgreement) -> Step:
        """Launch the forward pass of `plan`, which the rank has applied; `before` is the step before it.

        `agreed`: what all ranks have said of this step; which collectives run depends on it alone.
        """
        capacity = self._capacity(agreed)
        batch = self._sequences.batch(plan)
        rows = self._sequences.promised_rows(plan)
        seq_ids = tuple(grant.seq_id for grant in plan.grants if grant.samples)
        if rows:
            assert before is not None, "a token was promised, and no step is under way"
            places = {seq_id: place for place, seq_id in enumerate(before.seq_ids)}
            row_P, place_P = list(rows.values()), [places[seq_id] for seq_id in rows]
            work = partial(self._hidden_behind, batch, capacity, row_P, place_P, before)
            return Step(plan, seq_ids, self._device.launch(work))
        return Step(plan, seq_ids, self._device.launch(partial(self._hidden, batch, capacity)))

    def sample(self, step: Step) -> bool:
        """Launch the sampling of a step whose forward pass was launched; the step before it is finished.

        Whether that had to wait for masks.
        """
        samplings = self._sequences.row_samplings(step.plan)
        is_late = step.hidden_SD.done() and any(row.mask is not None for row in samplings)
        step.stuck = self._sequences.grammar_errors(step.plan)
        work = partial(
            self._read_out,
            step.hidden_SD,
            self._sequences.row_owners(step.plan),
            samplings,
            self._sequences.prompt_scores(step.plan),
        )
        step.outcome = self._device.launch(work)
        return is_late

    def finish(self, step: Step) -> Finished:
        """Wait for a step, and note its tokens. Raises what its launches raised."""
        assert step.outcome is not None, "it was not sampled"
        outcome, faults = step.outcome.result()
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

    def _capacity(self, agreed: StepAgreement) -> Capacity | None:
        """Of this step's exchange; None: exact."""
        if self._padding is None or agreed.has_prompts:
            return None
        return self._padding.capacity(max(even_shares(agreed.num_rows, self._model.tp)))

    # -- on the device thread --------------------------------------------------------------------------

    def _hidden_behind(
        self, batch: Batch, capacity: Capacity | None, row_P: list[int], place_P: list[int], before: Step
    ) -> Tensor:
        """The forward pass of a batch, some of whose tokens the step before has sampled."""
        assert before.outcome is not None, "a step runs before the one before it"
        token_ids = before.outcome.result()[0].sampled.token_ids
        batch.token_T[row_P] = torch.tensor([token_ids[place] for place in place_P])
        return self._hidden(batch, capacity)

    def _hidden(self, batch: Batch, capacity: Capacity | None) -> Tensor:
        """The last hidden rows; exchanged in frames where there is a `capacity` that suffices."""
        if capacity is not None:
            padded = PaddedExchange(self._exchange, capacity)
            x_SD = self._forward(batch, padded)
            self._exchange.num_steps_padded += 1
            if not padded.has_overflowed():
                return x_SD
            self._exchange.num_overflows += 1
        return self._forward(batch, self._exchange)

    def _forward(self, batch: Batch, exchange: TokenExchange) -> Tensor:
        model = self._model
        return decoder.hidden(
            batch, model.weights, model.cache, self._lane, exchange, model.architecture, model.kernels
        )

    def _read_out(
        self,
        hidden_SD: Future[Tensor],
        owner_S: Sequence[RequestId],
        samplings: Sequence[RowSampling],
        scores: Sequence[Sequence[PromptScore]],
    ) -> tuple[Outcome, dict[RequestId, str]]:
        """What the plan wants of the last hidden rows; the same on all tp ranks. Collective over the lane."""
        model = self._model
        x_SD, judged = self._guard.check(hidden_SD.result(), owner_S)
        if self._lane is None or model.weights.lane is None:
            return Outcome.nothing(), judged.read()
        readout = Readout(
            head=partial(decoder.head, weights=model.weights.lane, kernels=model.kernels),
            vocabulary=VocabularySlice.of(self._lane, model.architecture.vocab_size),
            end_token_ids=model.end_token_ids,
        )
        faults, outcome = both(judged, readout.launch(x_SD, samplings, scores)).read()
        return outcome, faults
