"""The simulated cluster loses nothing, repeats exactly, and takes the time that its steps are said to."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from k2dist.config import Architecture, read_architecture
from k2dist.config.cluster import CacheConfig, ClusterConfig, ParallelConfig, SchedulerConfig
from k2dist.demo import MODEL_DIR
from k2dist.errors import UsageError
from k2dist.parallel import configured_layout, first_layout
from k2dist.planner import StepModel, Workload, configured_terms, plan_memory
from k2dist.planner.arrivals import Arrival, Mix, made_up, read_trace, request_of
from k2dist.planner.chance import Chance
from k2dist.planner.loss import Loss, loss_of, read_loss
from k2dist.planner.plots import page, sheet
from k2dist.planner.report import Percentiles, SimulationReport
from k2dist.planner.simulate import Simulation, simulate
from k2dist.planner.site import configured_site
from k2dist.planner.skew import imbalance_of
from k2dist.planner.work import LaneWork

DEMO = read_architecture(MODEL_DIR)
CONFIG = ClusterConfig(
    name="small",
    parallel=ParallelConfig(lanes=3, tp=1),
    cache=CacheConfig(page_tokens=16, num_pages=24),
    scheduler=SchedulerConfig(step_tokens=64, chunk_tokens=32, max_running=8, max_waiting=16),
)


def model_of(config: ClusterConfig) -> StepModel:
    return StepModel(configured_site(config, DEMO, configured_layout(DEMO, config.parallel)))


def simulation(
    config: ClusterConfig, arrivals: list[Arrival], max_open: int | None = None, loss: Loss | None = None
) -> Simulation:
    return Simulation(config, model_of(config), arrivals, max_open=max_open, loss=loss)


def run(one: Simulation) -> SimulationReport:
    """To its end, with every invariant held after every turn."""
    one.check()
    for turned in simulate(one):
        turned.check()
    return one.report()


def mixed(num: int, rate: float | None, *, shared: float = 0.0, seed: int = 0) -> list[Arrival]:
    mix = Mix(workload=Workload(prompt_len=60, output_len=20), sigma=0.6, shared=shared, prefixes=2)
    return [replace(one, prompt_len=min(one.prompt_len, 200)) for one in made_up(mix, num, rate, seed)]


def loss_at(config: ClusterConfig, world_rank: int, at_s: float) -> Loss:
    layout = configured_layout(DEMO, config.parallel)
    rank = plan_memory(DEMO, layout, configured_terms(config, DEMO)).ranks[world_rank]
    return loss_of(DEMO, layout, rank, model_of(config).site, at_s, recapture_s=0.0)


@given(seed=st.integers(0, 2**32), rate=st.one_of(st.none(), st.floats(5, 500)))
@settings(max_examples=8, deadline=None)
def test_nothing_is_lost_whoever_comes_when(seed: int, rate: float | None) -> None:
    report = run(simulation(CONFIG, mixed(40, rate, seed=seed), max_open=20 if rate is None else None))
    assert report.num_requests == 40
    assert report.num_finished + report.num_refused == 40
    assert report.num_refused == 0


def test_short_pages_preempt_and_every_token_still_comes() -> None:
    config = replace(CONFIG, cache=CacheConfig(page_tokens=16, num_pages=16))
    arrivals = [Arrival(at_s=0.0, prompt_len=40, output_len=150) for _ in range(12)]
    report = run(simulation(config, arrivals))
    assert report.num_preempted > 0
    assert report.num_finished == 12
    assert report.output_tokens_per_s * report.duration_s == pytest.approx(12 * 150)


def test_one_request_takes_the_time_of_its_steps() -> None:
    """Three chunks of a prompt of 70, then a token a step: the sum of what each step is said to take."""
    model = model_of(CONFIG)
    report = run(simulation(CONFIG, [Arrival(at_s=1.5, prompt_len=70, output_len=4)]))

    def step_s(rows: int, start: int, *, is_prompt: bool) -> float:
        work = LaneWork(
            num_rows=rows,
            own_rows=rows,
            decode_rows=0 if is_prompt else rows,
            num_keys=0 if is_prompt else start + 1,
            prompt_rows=rows if is_prompt else 0,
            prompt_start=start if is_prompt else 0,
        )
        return model.step(work, rows).step_s

    first_s = sum(step_s(rows, start, is_prompt=True) for rows, start in ((32, 0), (32, 32), (6, 64)))
    rest_s = sum(step_s(1, start, is_prompt=False) for start in (70, 71, 72))
    assert report.ttft_s.most == pytest.approx(first_s)
    assert report.tpot_s.most == pytest.approx(rest_s / 3)
    assert report.duration_s == pytest.approx(1.5 + first_s + rest_s)
    assert report.idle_s == 1.5
    assert report.num_steps == 6


def test_equal_seeds_give_equal_reports() -> None:
    one, other = (run(simulation(CONFIG, mixed(30, 40.0))) for _ in range(2))
    assert one == other
    assert run(simulation(CONFIG, mixed(30, 40.0, seed=1))) != one


def test_common_beginnings_are_found_in_the_cache_of_each_lane() -> None:
    without = run(simulation(CONFIG, mixed(40, 20.0)))
    common = run(simulation(CONFIG, mixed(40, 20.0, shared=0.8)))
    assert without.cached_share == 0.0
    assert 0.2 < common.cached_share < 0.8
    assert common.prompt_tokens_per_s * common.duration_s < without.prompt_tokens_per_s * without.duration_s


def test_clients_that_wait_never_have_more_under_way_than_they_are() -> None:
    report = run(simulation(CONFIG, mixed(50, None), max_open=6))
    assert report.most_running <= 6
    assert report.num_finished == 50


def test_who_finds_the_queue_full_is_refused() -> None:
    config = replace(CONFIG, service=replace(CONFIG.service, max_queued=5))
    report = run(simulation(config, [Arrival(at_s=0.0, prompt_len=40, output_len=5)] * 40))
    assert report.num_refused == 40 - 3 * 8 - 5
    assert report.num_finished == 3 * 8 + 5


def test_a_lost_rank_costs_a_pause_and_no_request() -> None:
    loss = loss_at(CONFIG, 1, at_s=0.3)
    arrivals = mixed(40, 60.0)
    calm = run(simulation(CONFIG, arrivals))
    report = run(simulation(CONFIG, arrivals, loss=loss))
    assert loss.needs_reload, "each expert lies on one rank only"
    assert report.loss is not None
    assert (report.loss.lane, report.loss.pause_s) == (1, loss.pause_s)
    assert report.loss.num_readmitted > 0
    assert report.num_finished == 40
    assert report.duration_s > calm.duration_s + 0.9 * loss.pause_s
    assert report.ttft_s.most < calm.ttft_s.most + loss.pause_s + 1.0


def test_with_second_copies_the_others_go_on_before_it_is_replaced() -> None:
    config = replace(CONFIG, parallel=ParallelConfig(lanes=3, tp=1, slots_per_rank=8))
    loss = loss_at(config, 1, at_s=0.3)
    assert not loss.needs_reload
    assert loss.pause_s < loss.lane_back_s - 5.0
    report = run(simulation(config, mixed(40, 60.0), loss=loss))
    assert report.num_finished == 40
    assert report.duration_s < 0.3 + loss.lane_back_s, "two lanes were done before the third was back"


def test_what_is_taken_for_a_step_is_its_slowest_lane() -> None:
    """A prompt on one lane makes the step of all as long as its own."""
    alone = run(simulation(CONFIG, [Arrival(at_s=0.0, prompt_len=64, output_len=1)]))
    beside = [Arrival(at_s=0.0, prompt_len=64, output_len=1), Arrival(at_s=0.0, prompt_len=2, output_len=1)]
    assert run(simulation(CONFIG, beside)).step_s.most >= alone.step_s.most


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no request"),
        (
            '{"at_s": 1, "prompt_len": 5, "output_len": 5}\n{"at_s": 0, "prompt_len": 5, "output_len": 5}',
            "line 2",
        ),
        ('{"at_s": 1, "prompt_len": 0, "output_len": 5}', "line 1: prompt_len and output_len"),
        ('{"at_s": 1, "prompt": 5, "output_len": 5}', "line 1: .*prompt"),
        ('{"at_s": 1, "prompt_len": 5, "output_len": 5, "prefix_len": 5}', "line 1: prefix_len"),
    ],
)
def test_a_wrong_trace_is_refused_by_line(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_trace(text, "trace.jsonl")


def test_prompts_differ_from_behind_their_common_beginning() -> None:
    arrival = Arrival(at_s=0.0, prompt_len=10, output_len=1, prefix=3, prefix_len=6)
    one, other = (request_of(arrival, number, 1024, 4096).prompt for number in (5, 1029))
    assert one[:6] == other[:6]
    assert one[6:] != other[6:]
    assert len(one) == len(other) == 10
    assert all(0 <= token < 1024 for token in one)


def test_a_router_without_preferences_loads_all_ranks_alike(k2: Architecture) -> None:
    layout = first_layout(k2, lanes=16, tp=1)
    found = [imbalance_of(layout, 384, 8, skew) for skew in (0.0, 0.3, 0.6, 1.0)]
    assert found[0] == pytest.approx(1.0)
    assert found == sorted(found)
    assert found[-1] < 16


def test_second_copies_even_the_load_out(k2: Architecture) -> None:
    once, twice = (first_layout(k2, lanes=16, tp=1, slots_per_rank=slots) for slots in (24, 48))
    assert imbalance_of(twice, 384, 8, 0.8) < imbalance_of(once, 384, 8, 0.8)


def test_losses_are_read_as_rank_at_seconds() -> None:
    assert read_loss("3@1.5", 4) == (3, 1.5)
    for text in ("4@1", "3", "@1", "3@-1", "x@1"):
        with pytest.raises(UsageError, match="use RANK@SECONDS, with a rank from 0 to 3"):
            read_loss(text, 4)


def test_chance_is_splitmix64() -> None:
    """The published sequence of seed 1234567."""
    chance = Chance(1234567)
    assert [chance.integer() for _ in range(3)] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]
    lengths = [chance.spread(1000, 0.5) for _ in range(4000)]
    assert sum(lengths) / len(lengths) == pytest.approx(1000, rel=0.05)


def test_percentiles_are_of_the_nearest_rank() -> None:
    found = Percentiles.of([float(value) for value in range(1, 101)])
    assert found == Percentiles(p50=50, p90=90, p95=95, p99=99, most=100)
    assert Percentiles.of([]).most == 0.0


def test_curves_are_whole_and_lie_in_their_frames() -> None:
    report = run(simulation(CONFIG, mixed(30, 40.0), loss=loss_at(CONFIG, 0, at_s=0.2)))
    html = page("a <title>", [("first token", "1 & 2")], report)
    figures = html.split("<figure")[1:]
    assert len(figures) == 7
    assert "a &lt;title&gt;" in html
    assert "1 &amp; 2" in html
    assert "rank 0 lost" in html
    for figure in figures:
        svg = ElementTree.fromstring("<svg" + figure.split("<svg")[1].split("</svg>")[0] + "</svg>")
        width, height = float(svg.attrib["width"]), float(svg.attrib["height"])
        for line in svg.iter("polyline"):
            points = [tuple(map(float, pair.split(","))) for pair in line.attrib["points"].split()]
            assert points
            assert all(0 <= x <= width and 0 <= y <= height for x, y in points)
    picture = ElementTree.fromstring(sheet("a <title>", report))
    assert len([one for one in picture.iter() if one.tag.endswith("}g")]) == 7
    assert picture[0].text == "a <title>"
