"""Every metric of a cluster: name, kind, meaning, labels, and where its values come from.

Names are vLLM's where vLLM has one, so that dashboards need no more than our prefix. Dashboards and alerts in
`deploy/` are tested against this table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

from k2dist.messages import GroupStats, LaneLoad, RankStats
from k2dist.observe import (
    ClusterState,
    HistogramFacts,
    RankView,
    RequestFacts,
    Skew,
    StepPair,
    TenantFacts,
    WorldState,
)


class Shown(NamedTuple):
    """What values are read from."""

    state: ClusterState
    skew: Skew | None

    @property
    def requests(self) -> RequestFacts:
        return self.state.requests

    @property
    def ranks(self) -> tuple[RankView, ...]:
        return () if self.state.world is None else self.state.world.ranks


FamilyKind = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily
Value = float | HistogramFacts
Row = tuple[tuple[str, ...], Value]  # labels' values, in order, and the value


class Metric(NamedTuple):
    """One metric. Counters are shown with `_total`, histograms with `_bucket`, `_count` and `_sum`."""

    name: str
    kind: type[FamilyKind]
    text: str
    labels: tuple[str, ...]
    read: Callable[[Shown], Iterable[Row]]


_C, _G, _H = CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily


def _times(name: str, text: str, read: Callable[[RequestFacts], HistogramFacts]) -> Metric:
    return Metric(name, _H, text, (), lambda shown: [((), read(shown.requests))])


def _tokens(name: str, text: str, read: Callable[[TenantFacts], int]) -> Metric:
    """Of all tenants together."""
    return Metric(name, _C, text, (), lambda shown: [((), sum(map(read, shown.requests.tenants)))])


def _cluster(name: str, text: str, read: Callable[[ClusterState], float]) -> Metric:
    return Metric(name, _G, text, (), lambda shown: [((), read(shown.state))])


def _world(name: str, kind: type[FamilyKind], text: str, read: Callable[[WorldState], float]) -> Metric:
    def rows(shown: Shown) -> list[Row]:
        return [] if shown.state.world is None else [((), read(shown.state.world))]

    return Metric(name, kind, text, (), rows)


def _lane(name: str, kind: type[FamilyKind], text: str, read: Callable[[LaneLoad], float]) -> Metric:
    def rows(shown: Shown) -> Iterator[Row]:
        for lane in shown.state.lanes:
            if lane.load is not None:
                yield (str(lane.lane),), read(lane.load)

    return Metric(name, kind, text, ("lane",), rows)


def _rank(name: str, text: str, read: Callable[[RankStats], float]) -> Metric:
    def rows(shown: Shown) -> Iterator[Row]:
        for rank in shown.ranks:
            if rank.stats is not None:
                yield (str(rank.world_rank),), read(rank.stats)

    return Metric(name, _C, text, ("rank",), rows)


def _tenant_tokens(shown: Shown) -> Iterator[Row]:
    for tenant in shown.requests.tenants:
        yield (tenant.tenant, "prompt"), tenant.num_prompt_tokens
        yield (tenant.tenant, "cached"), tenant.num_cached_tokens
        yield (tenant.tenant, "generated"), tenant.num_generated_tokens


def _tenant_requests(shown: Shown) -> Iterator[Row]:
    for tenant in shown.requests.tenants:
        for outcome, count in tenant.num_requests.items():
            yield (tenant.tenant, outcome), count


def _tenant_queues(shown: Shown) -> Iterator[Row]:
    return (((tenant.tenant,), tenant.queued_s_total) for tenant in shown.requests.tenants)


def _ends(shown: Shown) -> Iterator[Row]:
    return (((reason,), count) for reason, count in shown.requests.num_ended.items())


def _silent_lanes(shown: Shown) -> Iterator[Row]:
    return (((str(lane.lane),), float(lane.is_silent)) for lane in shown.state.lanes)


def _rank_states(shown: Shown) -> Iterator[Row]:
    states = [rank.state for rank in shown.ranks]
    return (((state,), states.count(state)) for state in sorted(set(states)))


def _late_ranks(shown: Shown) -> Iterator[Row]:
    late = shown.state.health.late
    return (((str(rank.world_rank),), float(rank.world_rank in late)) for rank in shown.ranks)


def _silent_ranks(shown: Shown) -> Iterator[Row]:
    return (((str(rank.world_rank),), rank.silent_s) for rank in shown.ranks)


def _expert_rows(shown: Shown) -> Iterator[Row]:
    for rank in shown.ranks:
        yield (str(rank.world_rank),), sum(layer.num_rows for layer in rank.layers)


def _skews(shown: Shown) -> Iterator[Row]:
    if shown.skew is not None:
        yield ("ranks",), shown.skew.over_ranks
        yield ("experts",), shown.skew.over_experts


def _groups(shown: Shown) -> Iterator[tuple[str, GroupStats]]:
    for rank in shown.ranks:
        for group in () if rank.stats is None else rank.stats.groups:
            yield str(rank.world_rank), group


def _calls(shown: Shown) -> Iterator[Row]:
    for rank, group in _groups(shown):
        for call in group.collectives:
            yield (rank, group.group, call.call), call.num_calls


def _waits(shown: Shown) -> Iterator[Row]:
    for rank, group in _groups(shown):
        for call in group.collectives:
            yield (rank, group.group, call.call), call.wait_s_total


def _waiting(shown: Shown) -> Iterator[Row]:
    return (((rank, group.group), group.waiting_s) for rank, group in _groups(shown))


def _by_source(name: str, text: str, read: Callable[[StepPair], tuple[float, float]]) -> Metric:
    def rows(shown: Shown) -> Iterator[Row]:
        if shown.state.step is not None:
            estimate, measured = read(shown.state.step)
            yield ("estimate",), estimate
            yield ("measured",), measured

    return Metric(name, _G, text, ("source",), rows)


METRICS: tuple[Metric, ...] = (
    # requests, as the coordinator sees them, over gRPC and HTTP alike
    _times("time_to_first_token_seconds", "From arrival to the first token.", lambda x: x.first_token_s),
    _times("inter_token_latency_seconds", "Between tokens of one output.", lambda x: x.next_token_s),
    _times("e2e_request_latency_seconds", "From arrival to the end.", lambda x: x.whole_s),
    _times("request_queue_time_seconds", "In the coordinator's and a lane's queue.", lambda x: x.queue_s),
    _times("request_prefill_time_seconds", "From the queue to the first token.", lambda x: x.prefill_s),
    _times("request_decode_time_seconds", "From the first token to the end.", lambda x: x.decode_s),
    _times("request_prompt_tokens", "Prompt tokens of a request.", lambda x: x.prompt_tokens),
    _times("request_generation_tokens", "Tokens of an output.", lambda x: x.generated_tokens),
    Metric("request_success", _C, "Outputs that ended, by reason.", ("finished_reason",), _ends),
    _tokens("prompt_tokens", "Prompt tokens of accepted requests.", lambda x: x.num_prompt_tokens),
    _tokens("prompt_tokens_cached", "Of these, found in the cache.", lambda x: x.num_cached_tokens),
    _tokens("generation_tokens", "Tokens generated.", lambda x: x.num_generated_tokens),
    Metric(
        "tenant_tokens", _C, "By kind; cached ones are of the prompt.", ("tenant", "kind"), _tenant_tokens
    ),
    Metric("tenant_requests", _C, "Requests that ended.", ("tenant", "outcome"), _tenant_requests),
    Metric("tenant_queue_seconds", _C, "Of requests that got a token.", ("tenant",), _tenant_queues),
    _cluster("num_requests_queued", "Requests that no lane has taken yet.", lambda x: x.num_queued),
    # lanes
    _lane("num_requests_running", _G, "Outputs that hold pages.", lambda x: x.num_running),
    _lane("num_requests_waiting", _G, "Outputs that wait for pages.", lambda x: x.num_waiting),
    _lane("num_tokens_waiting", _G, "Known tokens of all that wait.", lambda x: x.num_tokens_waiting),
    _lane("kv_cache_usage_perc", _G, "Pages in use, 0 to 1.", lambda x: 1 - x.num_pages_free / x.num_pages),
    _lane("num_preemptions", _C, "Outputs that lost their pages.", lambda x: x.num_preemptions),
    _lane("prefix_cache_queries", _C, "Prompt tokens that began to run.", lambda x: x.num_prompt_tokens),
    _lane("prefix_cache_hits", _C, "Of these, found in the cache.", lambda x: x.num_cached_tokens),
    _lane("lane_steps", _C, "Steps committed.", lambda x: x.num_steps),
    Metric("lane_silent", _G, "1: it does not answer, its values are old.", ("lane",), _silent_lanes),
    # ranks
    Metric("ranks", _G, "Ranks by state.", ("state",), _rank_states),
    Metric("rank_late", _G, "1: a collective stands still for its sake.", ("rank",), _late_ranks),
    Metric("rank_silent_seconds", _G, "Asked so long ago, and no answer.", ("rank",), _silent_ranks),
    _rank("rank_steps", "Steps taken.", lambda x: x.num_steps),
    _rank("rank_step_seconds", "Time in steps, not asleep.", lambda x: x.step_s_total),
    _rank("rank_host_seconds", "Of it the step loop's own.", lambda x: x.host_s_total),
    _rank("rank_device_seconds", "Passes and sampling, waits included.", lambda x: x.device_s_total),
    _rank("rank_tokens_sampled", "Each tp rank samples its whole lane.", lambda x: x.num_tokens_sampled),
    _rank("rank_steps_replayed", "Of them from graphs, not eager.", lambda x: x.num_steps_replayed),
    _rank(
        "rank_decodes_eager", "Of them without prompts, and not from graphs.", lambda x: x.num_decodes_eager
    ),
    _rank("rank_graphs", "Recorded, one for each size of a step.", lambda x: x.num_recorded),
    _rank("dispatch_rows_sent", "Rows sent to other ranks' experts.", lambda x: x.num_rows_sent),
    _rank("dispatch_bytes_sent", "Of them, and of outputs sent home.", lambda x: x.num_bytes_sent),
    Metric("expert_rows", _C, "Tokens dispatched to it, over all layers.", ("rank",), _expert_rows),
    Metric("expert_load_skew", _G, "Busiest over average; 1 is even.", ("over",), _skews),
    _rank("exchange_steps_padded", "Steps in frames of a fixed capacity.", lambda x: x.num_steps_padded),
    _rank("exchange_overflows", "Of these, repeated: rows did not fit.", lambda x: x.num_overflows),
    _rank("masks", "Grammar masks made.", lambda x: x.num_masks),
    _rank("masks_seconds", "Time in making them.", lambda x: x.masks_s_total),
    _rank("masks_late", "Steps whose sampling waited for masks.", lambda x: x.num_masks_late),
    Metric("collective_calls", _C, "Collectives that ended.", ("rank", "group", "call"), _calls),
    Metric("collective_wait_seconds", _C, "Who waits least is late.", ("rank", "group", "call"), _waits),
    Metric("collective_waiting_seconds", _G, "In the one under way.", ("rank", "group"), _waiting),
    # the cluster
    _cluster("ready", "1: new requests are welcome.", lambda x: float(not x.health.not_ready)),
    _cluster("healthy", "1: steps advance where there is work.", lambda x: float(not x.health.unwell)),
    _by_source(
        "decode_step_seconds",
        "One step of all lanes at the present load: as planned, as measured since somebody last asked.",
        lambda x: (x.estimated_step_s, x.measured_step_s),
    ),
    _by_source(
        "decode_tokens_per_second",
        "Of all lanes, a token for each running output and step.",
        lambda x: (x.estimated_tokens_per_s, x.measured_tokens_per_s),
    ),
    _world("generation", _G, "It grows when ranks are replaced.", lambda x: x.generation),
    _world("recoveries", _C, "Times the world was rebuilt.", lambda x: x.recoveries.num_recoveries),
    _world("recovery_seconds", _C, "Nothing ran for so long because of it.", lambda x: x.recoveries.total_s),
    _world("recovery_under_way_seconds", _G, "Of the one under way.", lambda x: x.recoveries.under_way_s),
)
