"""The real admission, router, schedulers and pages under a virtual clock; only devices' time is estimated.

    arrivals ──> Admission ──choose──> Scheduler of a lane ──plan──> StepModel: how long ──commit──> tokens

Steps go as in `engine.runtime`: one is planned while the one before it computes, and begins when that ends.
All lanes step together, prompts on the same steps. Nothing here waits: a minute of 128 GPUs takes seconds.
`check` holds everything's invariants.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from k2dist.config.cluster import ClusterConfig
from k2dist.coordinator import Admission, choose
from k2dist.errors import CapacityError, RequestError
from k2dist.ids import Generation, LaneId, RequestId
from k2dist.messages import Event, LaneLoad, Request, StepPlan, StepResult
from k2dist.planner.arrivals import Arrival, request_of
from k2dist.planner.cost import StepCost, StepModel
from k2dist.planner.loss import Loss
from k2dist.planner.outage import Outage
from k2dist.planner.report import Percentiles, SimulationReport, Tally, quantiles
from k2dist.planner.simulated_lane import SimulatedLane
from k2dist.planner.work import LaneWork
from k2dist.scheduler import PrefillCadence

TOKEN = 7  # that every step samples; requests end by their length


@dataclass(slots=True)
class _Client:
    """One request, as whoever sent it sees it."""

    arrived_s: float
    first_s: float | None = None
    num_tokens: int = 0


@dataclass(frozen=True, slots=True)
class _Step:
    """Launched: `plans` by lane, those with grants. It computes `step_s`, and ends at `end_s`."""

    plans: dict[LaneId, StepPlan]
    step_s: float
    end_s: float
    prompt_rows: int
    binding: str


class Simulation:
    """`arrivals` in order of time. `max_open`: clients that wait for their answer before the next one comes;
    None: everybody comes when the clock says so."""

    def __init__(
        self,
        config: ClusterConfig,
        model: StepModel,
        arrivals: Iterable[Arrival],
        *,
        max_open: int | None = None,
        loss: Loss | None = None,
    ) -> None:
        self.now_s = 0.0
        self.num_arrived = self.num_finished = self.num_refused = 0
        self._config = config
        self._model = model
        self._architecture = model.site.architecture
        self._arrivals = iter(arrivals)
        self._next = next(self._arrivals, None)
        self._max_open = max_open
        self._outage = Outage(loss)
        self._admission = Admission(config.service.max_queued)
        self._lanes = {LaneId(lane): SimulatedLane(config, model.site) for lane in range(model.site.lanes)}
        self._clients: dict[RequestId, _Client] = {}
        self._cadence = PrefillCadence(config.scheduler.prefill_every)
        self._under_way: _Step | None = None
        self._num_steps = 0
        self._tally = Tally()
        self._most_running = self._most_waiting = 0

    # -- time ------------------------------------------------------------------------------------------

    def turn(self) -> bool:
        """One turn of every rank's step loop, or a leap to the next arrival; false once all is done."""
        self._meet_loss()
        self._take_arrivals()
        launched = self._launch()
        if self._under_way is not None:
            self.now_s = self._under_way.end_s
            self._commit(self._under_way)
        elif launched is None and not self._leap():
            return False
        self._under_way = launched
        return True

    def _leap(self) -> bool:
        """Nobody has work: to the next arrival, or the lost lane's return; false if there is nothing more."""
        times_s = [self._next.at_s] if self._next is not None else []
        is_waiting = bool(self._outage.waiting) or len(self._admission) > 0
        lost = self._outage.lost
        if lost is not None and is_waiting and not self._lanes[lost[0]].is_up:
            times_s.append(lost[1])
        if not times_s:
            return False
        until_s = max(min(times_s), self.now_s)
        self._tally.idle_s += until_s - self.now_s
        self.now_s = until_s
        return True

    # -- requests --------------------------------------------------------------------------------------

    def _take_arrivals(self) -> None:
        while self._next is not None and self._next.at_s <= self.now_s and self._has_client():
            arrival = self._next
            self._next = next(self._arrivals, None)
            self._offer(arrival)
        self._send_queued()

    def _has_client(self) -> bool:
        return self._max_open is None or len(self._clients) < self._max_open

    def _offer(self, arrival: Arrival) -> None:
        a = self._architecture
        request = request_of(arrival, self.num_arrived, a.vocab_size, a.max_positions)
        self.num_arrived += 1
        # Who waits for an answer sends the next request then; who comes by the clock has come by it.
        arrived_s = arrival.at_s if self._max_open is None else self.now_s
        try:
            self._admission.offer(request, self.now_s, deadline_s=self.now_s + self._config.service.queue_s)
        except CapacityError:
            self.num_refused += 1
            return
        self._clients[request.request_id] = _Client(arrived_s)
        self._send_queued()

    def _send_queued(self) -> None:
        """As the coordinator's dispatcher: those of a lost lane first, they were accepted."""
        while loads := self._loads():
            if self._outage.waiting:
                request = self._outage.waiting.popleft()
            else:
                admitted = self._admission.take(1, self.now_s)
                for expired in admitted.expired:
                    self._refuse(expired.request_id)
                if not admitted.ready:
                    return
                (request,) = admitted.ready
            self._add(choose(loads), request)

    def _loads(self) -> list[LaneLoad]:
        return [
            LaneLoad(lane=lane_id, num_running=lane.num_outputs, num_waiting=0, num_pages=0, num_pages_free=0)
            for lane_id, lane in self._lanes.items()
            if lane.is_up and lane.num_outputs < self._config.scheduler.max_running
        ]

    def _add(self, lane_id: LaneId, request: Request) -> None:
        lane = self._lanes[lane_id]
        try:
            events = lane.scheduler.add(request, self.now_s)
        except (RequestError, CapacityError):
            self._refuse(request.request_id)
            return
        lane.num_outputs += 1
        self._take_events(lane, events)

    def _refuse(self, request_id: RequestId) -> None:
        self.num_refused += 1
        del self._clients[request_id]

    # -- steps -----------------------------------------------------------------------------------------

    def _launch(self) -> _Step | None:
        """Plan all lanes' next step, and say when it will end; None if there is nothing to compute."""
        allows_prefill = self._cadence.allows_prefill
        plans: dict[LaneId, StepPlan] = {}
        works: list[LaneWork] = []
        for lane_id, lane in self._up().items():
            plan = lane.scheduler.plan(Generation(0), self._num_steps, self.now_s, prefill=allows_prefill)
            self._tally.num_preempted += lane.note_new(plan)
            if plan.grants:
                plans[lane_id] = plan
                works.append(lane.work(plan))
        if not plans:
            self._cadence.note(has_prompts=False, has_decodes=False)
            return None
        self._cadence.note(
            has_prompts=any(work.prompt_rows for work in works),
            has_decodes=any(work.decode_rows for work in works),
        )
        self._num_steps += 1
        cost = self._cost(works)
        begin_s = self.now_s if self._under_way is None else self._under_way.end_s
        return _Step(
            plans, cost.step_s, begin_s + cost.step_s, sum(work.prompt_rows for work in works), cost.binding
        )

    def _cost(self, works: list[LaneWork]) -> StepCost:
        """Of the lane that takes longest, which is the one with most prompt rows or most keys under it."""
        world_rows = sum(work.num_rows for work in works)
        candidates = {
            max(works, key=lambda work: (work.prompt_rows, work.num_rows)),
            max(works, key=lambda work: work.decode_rows * work.num_keys),
        }
        return max((self._model.step(work, world_rows) for work in candidates), key=lambda cost: cost.step_s)

    def _commit(self, step: _Step) -> None:
        num_tokens = 0
        for lane_id, plan in step.plans.items():
            lane = self._lanes[lane_id]
            seq_ids = tuple(grant.seq_id for grant in plan.grants if grant.samples)
            result = StepResult(
                generation=plan.generation,
                step=plan.step,
                seq_ids=seq_ids,
                token_ids=(TOKEN,) * len(seq_ids),
                logprobs=(None,) * len(seq_ids),
            )
            # Not all that was sampled: what a preempted sequence had under way is sampled again.
            num_tokens += self._take_events(lane, lane.scheduler.commit(result, self.now_s))
        loads = [lane.scheduler.load(lane_id) for lane_id, lane in self._lanes.items()]
        running = sum(load.num_running for load in loads)
        waiting = sum(load.num_waiting for load in loads) + len(self._admission) + len(self._outage.waiting)
        self._most_running = max(self._most_running, running)
        self._most_waiting = max(self._most_waiting, waiting)
        free = sum(load.num_pages_free for load in loads)
        self._tally.step(
            end_s=step.end_s,
            step_s=step.step_s,
            outputs=num_tokens,
            prompts=step.prompt_rows,
            running=running,
            waiting=waiting,
            pages_used=1.0 - free / sum(load.num_pages for load in loads),
            binding=step.binding,
        )

    def _take_events(self, lane: SimulatedLane, events: tuple[Event, ...]) -> int:
        """Returns how many tokens came."""
        num_tokens = 0
        for event in events:
            client = self._clients[event.request_id]
            num_tokens += len(event.token_ids)
            client.num_tokens += len(event.token_ids)
            if client.first_s is None:
                client.first_s = self.now_s
            if event.finish is not None:
                self._finish(lane, event, client, client.first_s)
        return num_tokens

    def _finish(self, lane: SimulatedLane, event: Event, client: _Client, first_s: float) -> None:
        tally = self._tally
        lane.num_outputs -= 1
        self.num_finished += 1
        del self._clients[event.request_id]
        tally.ttfts_s.append(first_s - client.arrived_s)
        tally.wholes_s.append(self.now_s - client.arrived_s)
        if client.num_tokens > 1:
            tally.tpots_s.append((self.now_s - first_s) / (client.num_tokens - 1))
        if event.usage is not None:
            tally.prompt_tokens += event.usage.prompt_tokens
            tally.cached_tokens += event.usage.cached_tokens

    # -- a rank is lost --------------------------------------------------------------------------------

    def _meet_loss(self) -> None:
        loss = self._outage.due(self.now_s)
        if loss is not None:
            self._lose(loss)
        lost = self._outage.lost
        if lost is not None and self.now_s >= lost[1]:
            self._lanes[lost[0]].is_up = True

    def _lose(self, loss: Loss) -> None:
        """The step under way is repeated once the others go on; the lost lane's requests go elsewhere."""
        requests: tuple[Request, ...] = ()
        step = self._under_way
        if loss.lane is not None:
            lane_id = LaneId(loss.lane)
            requests = self._lanes[lane_id].scheduler.live()
            self._lanes[lane_id] = SimulatedLane(self._config, self._model.site, is_up=False)
            if step is not None:
                step.plans.pop(lane_id, None)
        if step is not None:
            self._under_way = replace(step, end_s=self.now_s + loss.pause_s + step.step_s)
        else:
            self.now_s += loss.pause_s
        self._outage.meet(loss, requests)

    # -- the whole -------------------------------------------------------------------------------------

    def report(self) -> SimulationReport:
        tally = self._tally
        duration_s = max(self.now_s, 1e-9)
        total_s = max(sum(tally.binding_s.values()), 1e-9)
        bound = sorted(tally.binding_s.items(), key=lambda pair: -pair[1])
        return SimulationReport(
            num_requests=self.num_arrived,
            num_finished=self.num_finished,
            num_refused=self.num_refused,
            num_steps=self._num_steps,
            duration_s=self.now_s,
            idle_s=tally.idle_s,
            output_tokens_per_s=sum(step[2] for step in tally.steps) / duration_s,
            prompt_tokens_per_s=sum(step[3] for step in tally.steps) / duration_s,
            ttft_s=Percentiles.of(tally.ttfts_s),
            tpot_s=Percentiles.of(tally.tpots_s),
            whole_s=Percentiles.of(tally.wholes_s),
            step_s=Percentiles.of([step[1] for step in tally.steps]),
            num_preempted=tally.num_preempted,
            cached_share=tally.cached_tokens / max(tally.prompt_tokens, 1),
            most_running=self._most_running,
            most_waiting=self._most_waiting,
            imbalance=self._model.site.assumed.imbalance,
            binding={name: seconds / total_s for name, seconds in bound},
            loss=self._outage.report,
            ttfts_s=quantiles(tally.ttfts_s),
            tpots_s=quantiles(tally.tpots_s),
            moments=tally.moments(),
        )

    def check(self) -> None:
        """Assert that no request is lost, and what each core asserts of itself."""
        self._admission.check()
        for lane in self._lanes.values():
            lane.scheduler.check()
            assert len(lane.scheduler.live()) == lane.num_outputs, "the router miscounts a lane"
        held = sum(lane.num_outputs for lane in self._lanes.values())
        assert len(self._clients) == held + len(self._admission) + len(self._outage.waiting), (
            "a request is lost"
        )
        assert self.num_arrived == self.num_finished + self.num_refused + len(self._clients)

    def _up(self) -> dict[LaneId, SimulatedLane]:
        return {lane_id: lane for lane_id, lane in self._lanes.items() if lane.is_up}


def simulate(simulation: Simulation) -> Iterator[Simulation]:
    """Turn after turn, for whoever shows how far it is."""
    while simulation.turn():
        yield simulation
