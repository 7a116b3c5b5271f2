"""How long a step takes: a roofline of compute, memory and network for each part, and what binds it.

    a kernel      the longer of moving its bytes and doing its operations
    a collective  a wait for everybody, and its bytes over link and network card, the longer of the two
    a part        the sum of its kernels and collectives in all layers
    a step        the sum of its parts, or what the host needs for it if that is longer: they go side by side

Nothing overlaps on the device: k2dist runs no micro-batches yet. Rates are shares of the device's peaks
(`assumptions`). The rank that is looked at is the busiest one: its experts get `imbalance` times the mean.
"""

from __future__ import annotations

import enum
from collections import defaultdict

from k2dist.messages import Message
from k2dist.planner.layer_bytes import EvenLayer, LayerBytes
from k2dist.planner.site import Site
from k2dist.planner.work import (
    BF16_BYTES,
    FLOAT32_BYTES,
    LaneWork,
    Part,
    Sort,
    Traffic,
    Work,
    expert_work,
    lane_work,
)


class Term(enum.StrEnum):
    COMPUTE = "compute"
    MEMORY = "memory"
    NETWORK = "network"
    WAIT = "wait"  # for peers, counts and launches: it does not shrink with the rows
    HOST = "host"


class PartCost(Message, frozen=True, kw_only=True):
    """Seconds of one part in a step, by what they go for."""

    part: Part
    compute_s: float = 0.0
    memory_s: float = 0.0
    network_s: float = 0.0
    wait_s: float = 0.0

    @property
    def total_s(self) -> float:
        return self.compute_s + self.memory_s + self.network_s + self.wait_s

    @property
    def binding(self) -> Term:
        terms = (Term.COMPUTE, Term.MEMORY, Term.NETWORK, Term.WAIT)
        return max(terms, key=lambda term: getattr(self, f"{term}_s"))


class StepCost(Message, frozen=True, kw_only=True):
    """`parts` that take any time, in the order of a step. `bytes_sent`: by one rank to others, in a step."""

    parts: tuple[PartCost, ...]
    device_s: float
    host_s: float
    step_s: float
    bytes_sent: int

    @property
    def network_s(self) -> float:
        return sum(part.network_s for part in self.parts)

    @property
    def binding(self) -> str:
        """The part that takes longest, and what in it does."""
        if self.host_s > self.device_s:
            return str(Term.HOST)
        longest = max(self.parts, key=lambda part: part.total_s)
        return f"{longest.part}: {longest.binding}"


class StepModel:
    """The cost of any step of one site."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self._rates = _rates(site)
        assumed, share = site.assumed, site.rank_share
        self._link_rate = assumed.link * site.device.link_rate * share
        self._nic_rate = assumed.nic * site.device.nic_rate * share

    def even(self, work: LaneWork) -> StepCost:
        """All lanes have the same work."""
        return self.step(work, self.site.lanes * work.num_rows)

    def step(self, work: LaneWork, world_rows: int) -> StepCost:
        """`work`: of the lane that takes longest; `world_rows`: of all lanes together."""
        seconds = _Seconds()
        for one in lane_work(self.site.architecture, self.site.tp, work):
            self._take(seconds, one)
        lane_sent = self._lane_collectives(seconds, work)
        layers = self.site.architecture.num_moe_layers
        layer_sent = 0
        if layers:
            is_padded = self.site.padding is not None and not work.prompt_rows
            sent = self._sent(work, is_padded=is_padded)
            layer_sent = sent.total
            for one in expert_work(
                self.site.architecture, self.site.stream_bytes, self._traffic(work, world_rows)
            ):
                self._take(seconds, one._replace(times=layers))
            fullest = 1.0 if is_padded else self._fullest(work, world_rows)
            self._exchange(seconds, sent, layers, fullest, is_padded=is_padded)
        return self._finish(seconds, work, lane_sent + layers * layer_sent)

    # -- kernels ---------------------------------------------------------------------------------------

    def _take(self, seconds: _Seconds, work: Work) -> None:
        memory_rate, compute_rate = self._rates[work.sort]
        memory_s, compute_s = work.num_bytes / memory_rate, work.num_flops / compute_rate
        if compute_s > memory_s:
            seconds.add(work.part, Term.COMPUTE, work.times * compute_s)
        else:
            seconds.add(work.part, Term.MEMORY, work.times * memory_s)

    def _traffic(self, work: LaneWork, world_rows: int) -> Traffic:
        """Of the busiest rank in one layer."""
        site, a = self.site, self.site.architecture
        share, imbalance = site.slots / site.all_slots, site.assumed.imbalance
        own = site.own_rows(work.num_rows)
        copies = site.all_slots / a.num_experts
        is_hit = 1.0 - (1.0 - a.top_k / a.num_experts) ** (world_rows / copies)
        pairs = min(imbalance * world_rows * a.top_k * share, world_rows * min(a.top_k, site.slots))
        rows = min(imbalance * world_rows * (1.0 - (1.0 - share) ** a.top_k), world_rows)
        return Traffic(
            num_rows=own,
            rows_sent=own * site.world_size * (1.0 - (1.0 - 1.0 / site.world_size) ** a.top_k),
            rows_arrived=rows,
            row_bytes=site.sent_row_bytes + a.top_k * FLOAT32_BYTES,
            pairs=pairs,
            slots_hit=site.slots * is_hit,
        )

    # -- collectives -----------------------------------------------------------------------------------

    def _sent(self, work: LaneWork, *, is_padded: bool) -> LayerBytes:
        """By one rank to others in one MoE layer's exchange."""
        site, a = self.site, self.site.architecture
        own = site.own_rows(work.num_rows)
        even = EvenLayer(
            own, site.world_size, a.top_k, site.sent_row_bytes, a.hidden_size * site.stream_bytes
        )
        if is_padded and site.padding is not None and own:
            return even.padded(site.padding.capacity(own))
        return even.exact()

    def _exchange(
        self, seconds: _Seconds, sent: LayerBytes, layers: int, fullest: float, *, is_padded: bool
    ) -> None:
        """`fullest`: bytes through the fullest port of a rank, in times of `sent`."""
        site = self.site
        if site.world_size == 1:
            return
        wait_s = self._wait_s(site.world_size)
        for part, num_bytes in ((Part.DISPATCH, sent.out), (Part.COMBINE, sent.home)):
            seconds.add(part, Term.NETWORK, layers * self._moving_s(fullest * num_bytes, site.far_share))
            seconds.add(part, Term.WAIT, layers * wait_s)
        if not is_padded:  # the counts beforehand, and the host that hears them
            sync_s = 0.0 if site.is_cpu else 2 * site.assumed.sync_s
            seconds.add(Part.DISPATCH, Term.WAIT, layers * (wait_s + sync_s))

    def _fullest(self, work: LaneWork, world_rows: int) -> float:
        """What the busiest rank gets, or what one of this lane sends: links go both ways at once."""
        own = self.site.own_rows(work.num_rows)
        mean = world_rows / self.site.world_size
        return max(1.0, self.site.assumed.imbalance * mean / own) if own else 1.0

    def _lane_collectives(self, seconds: _Seconds, work: LaneWork) -> int:
        """Rows gathered and sums reduced among the tp ranks of a lane; returns bytes sent by one."""
        site, a = self.site, self.site.architecture
        if site.tp == 1 or not work.num_rows:
            return 0
        own, peers = site.own_rows(work.num_rows), site.tp - 1
        reduced = (work.num_rows - own) * a.hidden_size * FLOAT32_BYTES
        compressed = own * peers * (a.q_lora_rank + a.latent_dim) * BF16_BYTES
        whole = own * peers * a.hidden_size * BF16_BYTES
        total = 0
        for part, times, num_bytes in (
            (Part.EMBEDDING, 1, (reduced,)),
            (Part.ATTENTION, a.num_layers, (compressed, reduced)),
            (Part.DENSE, a.first_dense_layers, (whole, reduced)),
        ):
            far = max(site.tp - site.ranks_per_node, 0) / peers
            seconds.add(part, Term.NETWORK, times * sum(self._moving_s(one, far) for one in num_bytes))
            seconds.add(part, Term.WAIT, times * len(num_bytes) * self._wait_s(site.tp))
            total += times * sum(num_bytes)
        return total

    def _moving_s(self, num_bytes: float, far_share: float) -> float:
        return max(num_bytes * (1 - far_share) / self._link_rate, num_bytes * far_share / self._nic_rate)

    def _wait_s(self, members: int) -> float:
        site, assumed = self.site, self.site.assumed
        if site.is_cpu:
            return assumed.cpu_collective_s
        is_far = members > site.ranks_per_node
        return (assumed.far_collective_s if is_far else assumed.collective_s) + assumed.peer_s * members

    # -- the whole -------------------------------------------------------------------------------------

    def _finish(self, seconds: _Seconds, work: LaneWork, bytes_sent: int) -> StepCost:
        site, assumed = self.site, self.site.assumed
        kernels = site.architecture.num_layers * assumed.kernels_per_layer
        is_graph = site.padding is not None and not work.prompt_rows and not site.is_cpu
        host_s = assumed.host_step_s + assumed.agree_peer_s * site.world_size
        host_s += assumed.host_row_s * (work.decode_rows + work.prompts)
        launching_s = kernels * assumed.launch_s
        if site.is_cpu:  # who computes also calls
            seconds.add(Part.HOST, Term.WAIT, launching_s)
        else:
            seconds.add(Part.HOST, Term.WAIT, kernels * assumed.gap_s)
            host_s += 0.0 if is_graph else launching_s
        parts = seconds.parts()
        device_s = sum(part.total_s for part in parts)
        return StepCost(
            parts=parts,
            device_s=device_s,
            host_s=host_s,
            step_s=max(device_s, host_s),
            bytes_sent=bytes_sent,
        )


class _Seconds:
    """Of a step, by part and term."""

    def __init__(self) -> None:
        self._of: dict[tuple[Part, Term], float] = defaultdict(float)

    def add(self, part: Part, term: Term, seconds: float) -> None:
        self._of[part, term] += seconds

    def parts(self) -> tuple[PartCost, ...]:
        found = (
            PartCost(
                part=part,
                compute_s=self._of.get((part, Term.COMPUTE), 0.0),
                memory_s=self._of.get((part, Term.MEMORY), 0.0),
                network_s=self._of.get((part, Term.NETWORK), 0.0),
                wait_s=self._of.get((part, Term.WAIT), 0.0),
            )
            for part in Part
        )
        return tuple(one for one in found if one.total_s > 0.0)


def _rates(site: Site) -> dict[Sort, tuple[float, float]]:
    """Bytes and operations a second of one rank, for each sort of work."""
    device, assumed, share = site.device, site.assumed, site.rank_share
    memory, bf16 = device.memory_rate * share, device.bf16_flops * share
    float8 = (device.float8_flops or device.bf16_flops) * share
    return {
        Sort.FLOAT8: (assumed.memory * memory, assumed.float8 * float8),
        Sort.GROUPED: (assumed.memory * memory, assumed.grouped * float8),
        Sort.PLAIN: (assumed.memory * memory, assumed.bf16 * bf16),
        Sort.DECODE: (assumed.decode_memory * memory, assumed.attention * bf16),
        Sort.PROMPT: (assumed.memory * memory, assumed.attention * bf16),
        Sort.MOVE: (assumed.memory * memory, bf16),
    }
