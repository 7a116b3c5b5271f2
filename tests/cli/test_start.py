"""Before a cluster starts its memory is checked; while it loads the time left is said."""

from pathlib import Path

import pytest

from k2dist.cli.prepare import prepare_world
from k2dist.config.load import parse_cluster
from k2dist.errors import ConfigError, LayoutError
from k2dist.messages import RankProgress
from k2dist.observe.pace import Pace
from k2dist.observe.work import Work, work_line, work_of


def test_a_cluster_that_does_not_fit_is_refused_before_it_starts(tiny_model_dir: Path) -> None:
    text = "name: a\nparallel: {lanes: 2, tp: 1}\ncache: {page_tokens: 16, num_pages: 8}\n"
    known = "nodes: {num_nodes: 1, reserve_bytes: 0, device_bytes: %d}\n"
    prepare_world(parse_cluster(text, "x"), tiny_model_dir)
    prepare_world(parse_cluster(text + known % 10**9, "x"), tiny_model_dir)
    with pytest.raises(LayoutError, match="rank 0 does not fit its device, before any page"):
        prepare_world(parse_cluster(text + known % 10**6, "x"), tiny_model_dir)


def test_ranks_that_do_not_spread_evenly_over_nodes_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"nodes\.num_nodes=2: 3 ranks .* use a divisor of 3"):
        parse_cluster("name: a\nparallel: {lanes: 3, tp: 1}\nnodes: {num_nodes: 2}", "x")


def test_second_copies_can_be_asked_for(tiny_model_dir: Path) -> None:
    config = parse_cluster("name: a\nparallel: {lanes: 4, tp: 1, slots_per_rank: 6}", "x")
    layout = prepare_world(config, tiny_model_dir).layout
    assert {len(experts) for rank in layout.ranks for experts in rank.experts} == {6}


def test_what_is_loaded_is_said_with_rate_and_time_left_once_known() -> None:
    pace = Pace()
    pace.note(0, 100.0)
    assert work_line(Work("loaded", 0, 80 * 10**9), pace) == "loaded 0.00 of 80.00 GB"
    pace.note(20 * 10**9, 110.0)
    work = Work("tested", 20 * 10**9, 80 * 10**9)
    assert work_line(work, pace) == "tested 20.00 of 80.00 GB, 2.00 GB/s, 30 s left"
    assert work_line(Work("tested", 0, 2_508_364), Pace()) == "tested 0.0 of 2.5 MB"


def test_ranks_are_tested_together_once_all_have_loaded() -> None:
    ready = RankProgress(num_bytes=5, num_bytes_loaded=5, num_bytes_tested=5)
    testing = RankProgress(num_bytes=7, num_bytes_loaded=7, num_bytes_tested=2)
    loading = RankProgress(num_bytes=9, num_bytes_loaded=1)
    assert work_of([ready, testing, loading]) == Work("loaded", 13, 21)
    assert work_of([ready, testing]) == Work("tested", 7, 12)
    assert work_of([RankProgress()]) == Work("tested", 0, 0)
