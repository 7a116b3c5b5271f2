"""A rank from its first byte to its last step.

    load      read this rank's bytes, lay them out for the kernels, allocate the latent cache, self-test;
              where steps are recorded, compute one of every size
    join      become a member of a generation's groups; weights and pages outlive generations
    record    with all other ranks: the generation's graphs, before anything is asked of it
    run       plan, agree, step, commit; asleep while every lane is idle; until `stop` or a failure

One turn of `run`, taken by all ranks of the world together, while the step before computes (`steps`):

    1. a lane's first rank plans, and tells its tp peers
    2. all ranks agree: how many rows, all idle?, does anybody stop?
    3. launch the forward pass (every MoE layer is an exchange over all ranks, with rows or without)
    4. wait for the step before, commit it; launch the sampling
    5. all idle: sleep until a doorbell rings
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import msgspec
import torch

from k2dist.cache import PagePool
from k2dist.comm import Communicator
from k2dist.comm.agreement import StepAgreement, agree
from k2dist.comm.exchange import Exchange
from k2dist.comm.mesh import MeshCommunicator
from k2dist.config import read_architecture
from k2dist.engine.device_thread import DeviceThread
from k2dist.engine.doorbell import Doorbell
from k2dist.engine.form import FormRule
from k2dist.engine.forward import ForwardPass, Model
from k2dist.engine.graphs import CudaRecorder, Recorder, TwinRecorder
from k2dist.engine.guard import RowGuard
from k2dist.engine.identity import fingerprint
from k2dist.engine.lane import LanePort
from k2dist.engine.load import load_weights
from k2dist.engine.load_progress import LoadProgress, Tell
from k2dist.engine.masks import Masks
from k2dist.engine.recording import Note, record_sizes
from k2dist.engine.selftest import SelfTestReport, self_test
from k2dist.engine.sequences import Sequences
from k2dist.engine.spec import RankSpec
from k2dist.engine.steps import Step, Steps
from k2dist.engine.warm_up import warm_up
from k2dist.grammar import Grammars, mask_threads
from k2dist.ids import Generation
from k2dist.messages import GroupStats, Message, RankStats, StepPlan
from k2dist.parallel import expert_homes, shard_plan
from k2dist.parallel.fingerprint import Fingerprint
from k2dist.scheduler import PrefillCadence, Scheduler
from k2dist.text import Tokenizer, end_token_ids


@dataclass(frozen=True, slots=True)
class RankComms:
    """One rank's groups in one generation. Control groups carry plans and agreements, on the CPU."""

    world: Communicator
    world_control: Communicator
    lane: Communicator | None  # None: this rank holds experts and no lane
    lane_control: Communicator | None

    def fence(self) -> None:
        for group in (self.world, self.world_control, self.lane, self.lane_control):
            if group is not None:
                group.fence()

    def stats(self, now_s: float) -> tuple[GroupStats, ...]:
        """Of each group in which one can wait."""
        groups = {
            "world": self.world,
            "world-control": self.world_control,
            "lane": self.lane,
            "lane-control": self.lane_control,
        }
        return tuple(
            group.waits.facts(name, now_s)
            for name, group in groups.items()
            if isinstance(group, MeshCommunicator)
        )


class Bells(Protocol):
    def ring_all(self, epoch: int) -> None:
        """Ring the doorbell of every rank of the world for `epoch`, without waiting for any."""
        ...


class LoadReport(Message, frozen=True, kw_only=True):
    """`load_s`: of reading and laying out, without the self-test. `warm_s`: of steps of every size."""

    num_tensors: int
    num_bytes: int
    load_s: float
    self_test: SelfTestReport
    warm_s: float


@dataclass(frozen=True, slots=True)
class _Membership:
    """What a rank has for one generation and loses with it."""

    generation: Generation
    comms: RankComms
    bells: Bells
    exchange: Exchange
    passes: ForwardPass
    rule: FormRule  # of sizes that are recorded, on all ranks


class RankRuntime:
    """One rank; see the module. `run` belongs to one thread, all other methods to any."""

    def __init__(self, spec: RankSpec) -> None:
        self._spec = spec
        self._place = spec.layout.place(spec.world_rank)
        self._architecture = read_architecture(Path(spec.model_dir))
        self.device = spec.places.device
        self._kernels = spec.select_kernels()
        self._rule = spec.form_rule(self._architecture)
        self._doorbell = Doorbell()
        tokenizer = Tokenizer.load(Path(spec.model_dir))
        self._end_token_ids = end_token_ids(tokenizer, self._architecture.eos_token_ids)
        num_threads = mask_threads(torch.get_num_threads())
        grammars = Grammars(tokenizer, self._end_token_ids, num_threads=num_threads)
        self._masks = Masks(grammars, self._architecture.vocab_size)
        self.port = self._open_port(tokenizer, grammars)
        self._sequences = Sequences(spec.page_tokens, spec.layout.tp, self._masks)
        self._guard = RowGuard()
        self._cadence = PrefillCadence(spec.limits.prefill_every)
        self._is_stopping = threading.Event()
        self._model: Model | None = None
        self._member: _Membership | None = None
        self._thread = DeviceThread(f"device-{spec.world_rank}")
        self._num_steps = 0
        self._num_tokens = 0
        self._step_s_total = 0.0
        self._host_s_total = 0.0
        self._num_late = 0
        self._num_decodes_eager = 0

    def fingerprint(self) -> Fingerprint:
        """What its peers must have in common with it."""
        model_dir, tp = Path(self._spec.model_dir), self._spec.layout.tp
        return fingerprint(model_dir, self._kernels, tp, self.device)

    # -- from any thread -------------------------------------------------------------------------------

    def ring(self, epoch: int) -> None:
        self._doorbell.ring(epoch)

    def stop(self) -> None:
        """Leave the loop with all other ranks, after the step under way."""
        self._is_stopping.set()
        self._doorbell.nudge()

    def fence(self) -> None:
        """End this generation now: a wait under way raises `FencedError`."""
        if self._member is not None:
            self._member.comms.fence()
        self.stop()

    def stats(self) -> RankStats:
        exchange = None if self._member is None else self._member.exchange
        passes = None if self._member is None else self._member.passes
        return RankStats(
            world_rank=self._spec.world_rank,
            num_steps=self._num_steps,
            num_tokens_sampled=self._num_tokens,
            step_s_total=self._step_s_total,
            host_s_total=self._host_s_total,
            device_s_total=self._thread.busy_s,
            num_rows_sent=0 if exchange is None else exchange.num_rows_sent,
            num_bytes_sent=0 if exchange is None else exchange.num_bytes_sent,
            num_steps_padded=0 if exchange is None else exchange.num_steps_padded,
            num_overflows=0 if exchange is None else exchange.num_overflows,
            num_masks=self._masks.num_made,
            masks_s_total=self._masks.made_s_total,
            num_masks_late=self._num_late,
            expert_load=() if exchange is None else exchange.expert_load(),
            groups=() if self._member is None else self._member.comms.stats(time.monotonic()),
            num_steps_replayed=0 if passes is None else passes.num_steps_replayed,
            num_decodes_eager=self._num_decodes_eager,
            num_recorded=0 if passes is None else passes.num_recorded,
        )

    # -- the rank's own thread -------------------------------------------------------------------------

    def load(self, tell: Tell | None = None) -> LoadReport:
        """Read and lay out this rank's weights, allocate its pages, test itself, take a step of every size
        that will be recorded, and `tell` how far it is.

        Errors: CheckpointError, FaultyRankError.
        """
        started_s = time.monotonic()
        plan = shard_plan(self._architecture, self._spec.layout, self._spec.world_rank)
        progress = LoadProgress(plan.num_bytes, tell)
        weights = load_weights(
            Path(self._spec.model_dir),
            plan,
            self._architecture,
            self._spec.layout,
            self._kernels,
            self._spec.places,
            progress.loaded,
        )
        self._model = Model(
            weights,
            self._spec.allocate_cache(self._architecture, self._kernels, self._rule),
            self._architecture,
            self._kernels,
            self._spec.layout.tp,
            self._end_token_ids,
            self.device,
        )
        load_s = time.monotonic() - started_s
        report = self_test(
            Path(self._spec.model_dir),
            self._architecture,
            self._spec.layout,
            self._spec.world_rank,
            weights,
            self._kernels,
            page_tokens=self._spec.page_tokens,
            places=self._spec.places,
            progress=progress.tested,
        )
        began_s = time.monotonic()
        spec = self._spec
        if spec.is_recording or spec.device == "cuda":
            rule = self._rule if spec.is_recording else self._rule.only(())
            warm_up(self._model, spec.layout, spec.world_rank, rule, spec.limits, progress.warmed)
        return LoadReport(
            num_tensors=len(plan.reads),
            num_bytes=plan.num_bytes,
            load_s=load_s,
            self_test=report,
            warm_s=time.monotonic() - began_s,
        )

    def join(self, comms: RankComms, bells: Bells, generation: Generation) -> None:
        """Become a member of `generation`, whose groups are `comms`. Not while `run` runs.

        What was recorded holds the last generation's groups, and goes with them: until `record` all is eager.
        """
        assert self._model is not None, "join before load"
        num_layers = self._architecture.num_moe_layers
        homes = [
            expert_homes(self._spec.layout, layer, self._place.world_rank) for layer in range(num_layers)
        ]
        exchange = Exchange(comms.world, homes, self.device)
        most = next(iter(self._rule.buckets), None) if self._spec.is_recording else None
        passes = ForwardPass(self._model, comms.lane, exchange, most)
        self._member = _Membership(generation, comms, bells, exchange, passes, self._rule.only(()))

    def record(self, note: Note = lambda *_: None) -> None:
        """Record this generation's steps, and `note` how many of how many are. Collective over the world.

        Errors: as of `run`.
        """
        member = self._member
        assert member is not None, "record before join"
        try:
            with self._thread:
                rule = record_sizes(
                    self._rule,
                    member.passes,
                    self._recorder(member.comms),
                    member.comms.world_control,
                    self._thread,
                    limit_s=self._spec.record_s,
                    note=note,
                )
        except BaseException:
            member.comms.fence()
            raise
        self._member = replace(member, rule=rule)

    def run(self) -> None:
        """Step until stopped. A failure ends the port's requests with its reason and is raised."""
        assert self._model is not None, "run before load"
        assert self._member is not None, "run before join"
        member = self._member
        try:
            with self._thread:
                steps = Steps(
                    self._model,
                    self._sequences,
                    self._guard,
                    member.comms.lane,
                    member.exchange,
                    member.rule,
                    member.passes,
                    self._thread,
                )
                try:
                    self._run(member, steps)
                except BaseException:
                    member.comms.fence()  # what is under way on the device does not wait for its deadline
                    raise
        except Exception as error:  # a bug, too, must end the streams; it is raised again
            if self.port is not None:
                self.port.fail(f"world rank {self._place.world_rank} left the step loop: {error}")
            raise

    def _run(self, member: _Membership, steps: Steps) -> None:
        epoch = 0
        under_way: Step | None = None
        for number in range(2**62):
            began_s = time.monotonic()
            plan = self._share_plan(member, number)
            self._sequences.apply(plan)
            agreed = agree(member.comms.world_control, self._word(member, plan))
            self._cadence.note(has_prompts=agreed.has_prompts, has_decodes=agreed.has_decodes)
            is_launched = agreed.num_rows > 0 and not agreed.is_stopping
            launched = steps.forward(plan, under_way, agreed) if is_launched else None
            waited_s = 0.0 if under_way is None else self._finish(steps, under_way)
            if launched is not None:
                self._num_late += steps.sample(launched)
                self._num_decodes_eager += not agreed.has_prompts and not launched.is_replayed
            under_way = launched
            turn_s = time.monotonic() - began_s
            self._step_s_total += turn_s
            self._host_s_total += turn_s - waited_s
            if agreed.is_stopping:
                return
            if agreed.is_idle:
                if self._doorbell.wait(epoch, self._has_reason):
                    member.bells.ring_all(epoch)
                epoch += 1

    def _recorder(self, comms: RankComms) -> Recorder | None:
        """None: this rank's groups are not of a sort that a graph can hold, or nobody wants one."""
        if not self._spec.is_recording:
            return None
        if self._spec.graphs == "twin":
            cache = None if self._model is None else self._model.cache
            return TwinRecorder(lambda: None if cache is None else cache.spoil_spare())
        if self._kernels.asks_device or (comms.lane is not None and not comms.lane.is_on_stream):
            return None
        are_calls_outside = self._spec.experts_device == "cpu" or not comms.world.is_on_stream
        return CudaRecorder(calls_outside=are_calls_outside)

    def _word(self, member: _Membership, plan: StepPlan) -> StepAgreement:
        """What this rank says of the step that its lane has planned."""
        are_prompts = {self._sequences.is_prompt(grant) for grant in plan.grants}
        return StepAgreement(
            generation=member.generation,
            step=plan.step,
            num_rows=sum(grant.num_tokens for grant in plan.grants),
            is_idle=not plan.grants and not self._has_work(),
            is_stopping=self._is_stopping.is_set(),
            has_prompts=True in are_prompts,
            has_decodes=False in are_prompts,
            num_pages=self._sequences.num_pages(plan),
        )

    def _finish(self, steps: Steps, step: Step) -> float:
        """Commit a step that was launched; for how many seconds that had to wait for it."""
        began_s = time.monotonic()
        finished = steps.finish(step)
        waited_s = time.monotonic() - began_s
        self._num_steps += 1
        self._num_tokens += len(step.seq_ids)
        if self.port is not None:
            self.port.end(finished.faults, is_spoiled=True)
            self.port.end(finished.stuck, is_spoiled=False)
            if step.plan.grants:
                self.port.commit(finished.result)
        return waited_s

    def _share_plan(self, member: _Membership, step: int) -> StepPlan:
        """This lane's plan; on all its tp ranks the same. An empty one where there is no lane."""
        lane = member.comms.lane_control
        if lane is None:
            return StepPlan(generation=member.generation, step=step)
        if self.port is None:
            return _PLAN_DECODER.decode(lane.broadcast_bytes(None, source=0))
        plan = self.port.plan(member.generation, step, prefill=self._cadence.allows_prefill)
        lane.broadcast_bytes(_PLAN_ENCODER.encode(plan), source=0)
        return plan

    def _open_port(self, tokenizer: Tokenizer, grammars: Grammars) -> LanePort | None:
        """The lane's inbox and outbox, on its first rank."""
        if self._place.lane is None or self._place.tp_rank != 0:
            return None
        spec = self._spec
        scheduler = Scheduler(
            spec.limits,
            PagePool(spec.num_pages, spec.page_tokens),
            end_token_ids=self._end_token_ids,
            token_bytes=tokenizer.text_bytes,
            max_positions=self._architecture.max_positions,
        )
        port = LanePort(
            self._place.lane,
            scheduler,
            vocab_size=self._architecture.vocab_size,
            retain_s=spec.retain_s,
            check_constraint=grammars.check,
        )
        port.wake = self._doorbell.nudge
        return port

    def _has_work(self) -> bool:
        return self.port is not None and self.port.has_work

    def _has_reason(self) -> bool:
        return self._is_stopping.is_set() or self._has_work()


_PLAN_ENCODER = msgspec.msgpack.Encoder()
_PLAN_DECODER = msgspec.msgpack.Decoder(StepPlan)
