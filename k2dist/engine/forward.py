"""From a batch to its last hidden rows, in the form that all ranks have agreed on (`form`).

    eager      the batch goes to the device, and the decoder runs
    recorded   the batch goes into a static one, and what was recorded of its size is replayed

Sizes are recorded before the first step (`recording`), by all ranks together: graphs hold collectives.
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
from k2dist.engine.form import Form
from k2dist.engine.graphs import Recorder, Recording
from k2dist.engine.split import halves
from k2dist.engine.staging import Staged
from k2dist.engine.static_batch import StaticBatch, StaticRoom
from k2dist.model import decoder
from k2dist.model.batch import Batch
from k2dist.model.latent_cache import LatentCache
from k2dist.model.pieces import Pieces, in_line, side_by_side
from k2dist.model.transfer import to_device
from k2dist.model.weights import Weights
from k2dist.parallel.buckets import Bucket


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


@dataclass(frozen=True, slots=True)
class _Static:
    """One form's static batch (None on a rank without a lane) and its exchange."""

    batch: StaticBatch | None
    exchange: PaddedExchange


@dataclass(frozen=True, slots=True)
class _Recorded:
    static: _Static
    recording: Recording
    num_bytes_sent: int  # in each step: a replay counts nothing on the host


class ForwardPass:
    """One rank's, in one generation. `stage` belongs to the step loop, all else to the device thread.

    `most`: room is made for static batches up to this size; None: every step is eager.
    """

    def __init__(
        self,
        model: Model,
        lane: Communicator | None,
        exchange: Exchange,
        most: Bucket | None = None,
    ) -> None:
        self._model = model
        self._lane = lane
        self._exchange = exchange
        self._room: StaticRoom | None = None
        if most is not None and lane is not None:
            kernels, width = model.kernels, model.architecture.hidden_size
            self._room = StaticRoom(most, width, kernels.dtype, model.device)
        self._recorded: dict[Form, _Recorded] = {}
        self._aside = Aside(model.device)
        self.num_steps_replayed = 0

    @property
    def num_recorded(self) -> int:
        return len(self._recorded)

    def try_out(self, form: Form) -> None:
        """Compute a step of a bucket's size without a row that is any. Collective. Nothing is counted but
        calls."""
        assert form.bucket is not None, "only buckets have a size"
        self._compute(self._static(form, form.bucket))

    def record(self, form: Form, recorder: Recorder) -> None:
        """Try `form` out, then record it: from now on its steps are replayed. Collective."""
        assert form.bucket is not None, "only buckets have a size"
        static = self._static(form, form.bucket)
        self._compute(static)
        num_bytes_sent = static.exchange.num_bytes_sent
        recording = recorder.record(partial(self._static_pieces, static))
        self._recorded[form] = _Recorded(static, recording, num_bytes_sent)
        self.settle()

    def settle(self) -> None:
        """Before the host reads, or goes on to something else: a peer that is late is found here."""
        self._exchange.comm.settle()
        if self._lane is not None:
            self._lane.settle()

    def stage(self, batch: Batch, form: Form) -> StagedBatch:
        """Send `batch`, on the CPU, on its way to the device, beside what computes there."""
        static = None if form.bucket is None else self._recorded[form].static.batch
        if static is None or self._room is None:
            return StagedBatch(batch, form, None)
        fill_ = partial(static.fill_, batch=batch)
        return StagedBatch(batch, form, self._room.staging.put(fill_, len(static.buffer)))

    def run(self, staged: StagedBatch) -> Hidden:
        """The last hidden rows; exchanged in frames where the form says so."""
        form = staged.form
        if form.bucket is not None:
            return self._replayed(staged, self._recorded[form])
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

    def _replayed(self, staged: StagedBatch, recorded: _Recorded) -> Hidden:
        static = recorded.static
        if static.batch is not None and staged.staged is not None:
            staged.staged.copy_to_(static.batch.buffer)
            static.batch.put_tokens_(staged.batch.token_T)
        x_BD = recorded.recording.replay()
        self.num_steps_replayed += 1
        x_SD = x_BD[: len(staged.batch.sample_S)]
        return self._hidden(x_SD, static.exchange, recorded.num_bytes_sent)

    def _compute(self, static: _Static) -> None:
        """A step of rows that are none: kernels are compiled for its shapes, and memory is there."""
        if static.batch is not None and self._room is not None:
            fill_ = partial(static.batch.fill_, batch=Batch.empty(self._model.tp))
            self._room.staging.put(fill_, len(static.batch.buffer)).copy_to_(static.batch.buffer)
        in_line(self._static_pieces(static))
        self.settle()

    def _static_pieces(self, static: _Static) -> Pieces:
        """Of the rows that the static batch holds. What it gives is where the next size's is, too."""
        static.exchange.begin(None if static.batch is None else static.batch.is_own_row())
        if static.batch is None:
            nobody = Batch.empty(self._model.tp, self._model.device)
            return (yield from self._pieces(nobody, static.exchange))
        x_BD = yield from self._pieces(static.batch.batch, static.exchange)
        return static.batch.hidden_BD.copy_(x_BD)

    def _static(self, form: Form, bucket: Bucket) -> _Static:
        model = self._model
        exchange = PaddedExchange(self._exchange, form.capacity)
        if self._lane is None or model.cache is None or self._room is None:
            return _Static(None, exchange)
        return _Static(StaticBatch(bucket, model.tp, self._lane.rank, model.cache, self._room), exchange)

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
