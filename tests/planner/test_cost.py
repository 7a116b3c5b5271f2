"""A step's estimate obeys the roofline: what is faster never makes it longer, and what binds is named."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from k2dist.config import Architecture
from k2dist.planner.assumptions import ASSUMED
from k2dist.planner.cost import StepCost, StepModel, Term
from k2dist.planner.devices import DEVICES, Device
from k2dist.planner.estimate import Bounds, Workload, estimate
from k2dist.planner.site import Site
from k2dist.planner.work import LaneWork, Part

BOUNDS = Bounds(step_tokens=4096, chunk_tokens=2048, max_running=256, cache_tokens=768_000)


def site(k2: Architecture, lanes: int = 16, tp: int = 1, nodes: int = 2, device: str = "h200") -> Site:
    world_size = lanes * tp
    return Site(
        architecture=k2,
        device=DEVICES[device],
        lanes=lanes,
        tp=tp,
        world_size=world_size,
        ranks_per_node=world_size // nodes,
        slots=384 / world_size,
        all_slots=384,
        padding=None,
        stream_bytes=2,
    )


def decoding(rows: int, tp: int = 1, keys: int = 2000) -> LaneWork:
    return LaneWork(num_rows=rows, own_rows=-(-rows // tp), decode_rows=rows, num_keys=keys, prompt_rows=0)


def faster(at: Site, **rates: float) -> Site:
    device: Device = replace(at.device, **rates)
    return Site(**{name: getattr(at, name) for name in Site.__dataclass_fields__} | {"device": device})


def seconds(cost: StepCost, term: Term) -> float:
    """What all parts together spend on it."""
    return sum(getattr(part, f"{term}_s") for part in cost.parts)


def test_more_rows_and_more_keys_never_take_less(k2: Architecture) -> None:
    model = StepModel(site(k2))
    by_rows = [model.even(decoding(rows)).step_s for rows in (1, 2, 8, 64, 256)]
    by_keys = [model.even(decoding(64, keys=keys)).step_s for keys in (1, 1000, 100_000)]
    assert by_rows == sorted(by_rows)
    assert by_keys == sorted(by_keys)
    assert by_rows[-1] / by_rows[0] < 256, "weights are read once for all rows"


@pytest.mark.parametrize(
    ("rate", "term"),
    [
        ("memory_rate", Term.MEMORY),
        ("nic_rate", Term.NETWORK),
    ],
)
def test_what_a_doubled_rate_saves_is_half_of_its_term(k2: Architecture, rate: str, term: Term) -> None:
    at = site(k2)
    slow = StepModel(at).even(decoding(64))
    fast = StepModel(faster(at, **{rate: 2 * getattr(at.device, rate)})).even(decoding(64))
    assert seconds(fast, term) == pytest.approx(seconds(slow, term) / 2, rel=0.15)
    for other in {Term.MEMORY, Term.NETWORK, Term.WAIT} - {term}:
        assert seconds(fast, other) == pytest.approx(seconds(slow, other), rel=1e-9)


def test_one_rank_sends_nothing_and_waits_for_nobody(k2: Architecture) -> None:
    cost = StepModel(site(k2, lanes=1, nodes=1, device="b200")).even(decoding(8))
    assert cost.bytes_sent == 0
    assert cost.network_s == 0
    assert {part.part for part in cost.parts if part.wait_s} == {Part.HOST}


def test_inside_one_node_no_byte_goes_by_the_network_card(k2: Architecture) -> None:
    one, two = site(k2, lanes=8, nodes=1), site(k2, lanes=16, nodes=2)
    assert one.far_share == 0
    assert two.far_share == pytest.approx(8 / 15)
    none = faster(one, nic_rate=1.0)
    assert StepModel(none).even(decoding(64)) == StepModel(one).even(decoding(64))


def test_decode_of_one_row_reads_what_one_row_needs(k2: Architecture) -> None:
    """32.86 B parameters are active for a token (k2_facts 3); head and attention of float8 and bfloat16."""
    at = site(k2, lanes=1, nodes=1)
    cost = StepModel(at).even(decoding(1, keys=1))
    read = seconds(cost, Term.MEMORY) * at.device.memory_rate * ASSUMED.memory
    experts = 60 * 8 * 44.05e6
    rest = 60 * 44.05e6 + 396e6 + 61 * (101e6 + 8.4e6) + 2 * 163840 * 7168 + 60 * 4 * 384 * 7168
    assert read == pytest.approx(experts + rest, rel=0.02)


def test_the_longest_part_is_the_one_that_is_named(k2: Architecture) -> None:
    cost: StepCost = StepModel(site(k2)).even(decoding(256))
    longest = max(cost.parts, key=lambda part: part.total_s)
    assert cost.binding == f"{longest.part}: {longest.binding}"
    assert cost.device_s == pytest.approx(sum(part.total_s for part in cost.parts))
    assert cost.step_s == max(cost.device_s, cost.host_s)


def test_a_slow_host_is_what_binds(k2: Architecture) -> None:
    at = site(k2)
    slow = Site(
        **{name: getattr(at, name) for name in Site.__dataclass_fields__}
        | {"assumed": replace(ASSUMED, host_step_s=1.0)}
    )
    cost = StepModel(slow).even(decoding(1))
    assert cost.binding == "host"
    assert cost.step_s == cost.host_s > 1.0


def test_a_target_is_kept_by_having_fewer_under_way(k2: Architecture) -> None:
    model = StepModel(site(k2))
    free = estimate(model, BOUNDS, Workload(prompt_len=1000, output_len=1000)).serving
    kept = estimate(model, BOUNDS, Workload(prompt_len=1000, output_len=1000, target_tpot_s=0.06)).serving
    assert (free.limit, kept.limit) == ("scheduler.max_running", "--target-tpot")
    assert kept.tpot_s <= 0.06 < free.tpot_s
    assert kept.concurrency < free.concurrency
    assert kept.output_tokens_per_s < free.output_tokens_per_s


def test_serving_gives_as_many_prompt_tokens_as_its_requests_have(k2: Architecture) -> None:
    for prompt_len, output_len in ((100, 2000), (2000, 500), (30_000, 100)):
        workload = Workload(prompt_len=prompt_len, output_len=output_len)
        serving = estimate(StepModel(site(k2)), BOUNDS, workload).serving
        assert serving.prompt_tokens_per_s / prompt_len == pytest.approx(serving.requests_per_s)
        assert serving.output_tokens_per_s / output_len == pytest.approx(serving.requests_per_s)


def test_every_fact_of_a_device_has_a_source() -> None:
    for device in DEVICES.values():
        for name in ("memory_rate", "bf16_flops", "float8_flops", "link_rate", "nic_rate"):
            assert device.sources[name], (device.name, name)
        assert (device.memory_bytes is None) == ("memory_bytes" not in device.sources)
