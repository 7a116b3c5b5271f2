"""From a batch to its last hidden rows, in the form that all ranks have agreed on (`form`).

    eager      the batch goes to the device, and the decoder runs
    recorded   the batch goes into a static one. The first step of a form runs eagerly on it: then kernels are
               compiled and memory is there. The second records it, and it and all later ones replay

Every rank does alike, since forms follow from agreements: graphs that hold collectives are recorded together.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from k2kernels import KernelSet
from torch import Tensor

from k2dist.comm import Communicator, Exchange, PaddedExchange, TokenExchange
from k2dist.config import Architecture
from k2dist.engine.aside import Aside
from k2dist.engine.form import Bucket, Form
from k2dist.engine.graphs import Recorder, Recording
from k2dist.engine.split import halves
from k2dist.engine.staging import Staged, Staging
from k2dist.engine.static_batch import StaticBatch
from k2dist.model import decoder
from k2dist.model.batch import Batch
from k2dist.model.latent_cache import LatentCache
from k2dist.model.pieces import Pieces, in_line, side_by_side
from k2dist.model.transfer import to_device
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
    device: torch.device


@dataclass(frozen=True, slots=True)
class StagedBatch:
    """A batch on its way. On the CPU still: its tokens may be filled in until it runs."""

    batch: Batch
    form: Form
    staged: Staged | None  # all but its tokens, for a static batch


@dataclass(frozen=True, slots=True)
class Hidden:
    """Queued, and perhaps not computed yet. Of a padded step that has overflowed the rows mean nothing."""

    x_SD: Tensor
    has_overflowed: Tensor | None  # bool, on the device; None: nothing could
    done: torch.cuda.Event | None

    def is_done(self) -> bool:
        """Whether the device has come so far."""
        return self.done is None or self.done.query()


class _Static:
    """One form's static batch and what has become of it."""

    def __init__(self, batch: StaticBatch | None, exchange: PaddedExchange, staging: Staging | None) -> None:
        self.batch = batch
        self.exchange = exchange
        self.staging = staging
        self.has_run = False
        self.recording: Recording | None = None
        self.num_bytes_sent = 0  # in each step: a replay counts nothing on the host


class ForwardPass:
    """One rank's, in one generation. `stage` belongs to the step loop, all else to the device thread.

    `recorder`: None: every step is eager.
    """

    def __init__(
        self,
        model: Model,
        lane: Communicator | None,
        exchange: Exchange,
        recorder: Recorder | None,
    ) -> None:
        self._model = model
        self._lane = lane
        self._exchange = exchange
        self._recorder = recorder
        self._statics: dict[Form, _Static] = {}
        self._aside = Aside(model.device)
        self.num_steps_replayed = 0
        self.num_recorded = 0

    def stage(self, batch: Batch, form: Form) -> StagedBatch:
        """Send `batch`, on the CPU, on its way to the device, beside what computes there."""
        if form.bucket is None:
            return StagedBatch(batch, form, None)
        if form not in self._statics:
            self._statics[form] = self._static(form, form.bucket)
        static = self._statics[form]
        if static.batch is None or static.staging is None:
            return StagedBatch(batch, form, None)
        return StagedBatch(batch, form, static.staging.put(partial(static.batch.fill_, batch=batch)))

    def run(self, staged: StagedBatch) -> Hidden:
        """The last hidden rows; exchanged in frames where the form says so."""
        form = staged.form
        if form.bucket is not None:
            return self._recorded(staged, self._statics[form])
        if form.capacity is None:
            return self.exactly(staged)
        padded = PaddedExchange(self._exchange, form.capacity)
        x_SD = self._eager(staged, padded)
        return self._hidden(x_SD, padded, padded.num_bytes_sent)

    def exactly(self, staged: StagedBatch) -> Hidden:
        """With exact splits, in which every row has room."""
        return self._hidden(self._eager(staged, self._exchange), None, 0)

    # --------------------------------------------------------------------------------------------------

    def _eager(self, staged: StagedBatch, exchange: TokenExchange) -> Tensor:
        device = self._model.device
        if staged.form.num_parts == 1:
            return in_line(self._pieces(staged.batch.to(device), exchange))
        parts, place_S = halves(staged.batch)
        works = [self._pieces(part.to(device), exchange) for part in parts]
        return torch.cat(side_by_side(works, self._aside.begin))[to_device(place_S, device)]

    def _pieces(self, batch: Batch, exchange: TokenExchange) -> Pieces:
        model = self._model
        return decoder.pieces(
            batch, model.weights, model.cache, self._lane, exchange, model.architecture, model.kernels
        )

    def _recorded(self, staged: StagedBatch, static: _Static) -> Hidden:
        assert self._recorder is not None, "forms with buckets are for ranks that record"
        if static.batch is not None and staged.staged is not None:
            staged.staged.copy_to_(static.batch.buffer)
            static.batch.put_tokens_(staged.batch.token_T)
        begin = partial(self._static_pieces, static)
        if not static.has_run:
            x_BD = in_line(begin())
            static.has_run = True
            static.num_bytes_sent = static.exchange.num_bytes_sent
        else:
            if static.recording is None:
                static.recording = self._recorder.record(begin)
                self.num_recorded += 1
            x_BD = static.recording.replay()
            self.num_steps_replayed += 1
        x_SD = x_BD[: len(staged.batch.sample_S)]
        return self._hidden(x_SD, static.exchange, static.num_bytes_sent)

    def _static_pieces(self, static: _Static) -> Pieces:
        static.exchange.begin(None if static.batch is None else static.batch.is_own_row())
        batch = Batch.empty(self._model.tp, self._model.device)
        x_BD = yield from self._pieces(batch if static.batch is None else static.batch.batch, static.exchange)
        return x_BD

    def _static(self, form: Form, bucket: Bucket) -> _Static:
        model = self._model
        exchange = PaddedExchange(self._exchange, form.capacity)
        if self._lane is None or model.cache is None:
            return _Static(None, exchange, None)
        batch = StaticBatch(bucket, model.tp, self._lane.rank, model.cache, model.device)
        return _Static(batch, exchange, Staging(StaticBatch.size(bucket), model.device))

    def _hidden(self, x_SD: Tensor, padded: PaddedExchange | None, num_bytes: int) -> Hidden:
        """Counts a padded step, whose frames took `num_bytes`."""
        flag = None
        self._exchange.num_bytes_sent += num_bytes
        if padded is not None and padded.can_overflow:
            self._exchange.num_steps_padded += 1
            flag = padded.has_any_overflowed
        done = None
        if self._model.device.type == "cuda":
            done = torch.cuda.Event()
            done.record()
        return Hidden(x_SD, flag, done)
