"""What a rank says of its collectives: how many, how long, and the one it is in."""

from k2dist.messages import CollectiveStats, GroupStats
from k2dist.observe import Histogram, Recoveries, Waits


def test_time_in_calls_is_told_by_kind_and_the_one_under_way_by_name() -> None:
    waits = Waits()
    for began_s, ended_s in ((1.0, 1.5), (2.0, 2.25)):
        waits.begin("all_to_all_rows", began_s)
        waits.end(ended_s)
    waits.begin("exchange_ints", 3.0)
    assert waits.facts("world", 7.0) == GroupStats(
        group="world",
        num_begun=3,
        collectives=(CollectiveStats(call="all_to_all_rows", num_calls=2, wait_s_total=0.75),),
        under_way="exchange_ints",
        waiting_s=4.0,
    )
    waits.end(8.0)
    facts = waits.facts("world", 9.0)
    assert (facts.under_way, facts.waiting_s, facts.num_begun) == ("", 0.0, 3)


def test_a_value_on_a_bound_counts_below_it() -> None:
    histogram = Histogram((0.1, 1.0))
    histogram.observe(0.1)
    histogram.observe(0.5, 3)
    histogram.observe(7.0)
    facts = histogram.facts()
    assert facts.counts == (1, 3, 1)
    assert facts.total == 0.1 + 1.5 + 7.0


def test_a_recovery_is_from_the_break_until_it_runs_again() -> None:
    recoveries = Recoveries()
    recoveries.note(0, 1.0, is_running=False, is_ending=False)  # the first start
    recoveries.note(1, 5.0, is_running=True, is_ending=False)
    assert recoveries.facts(6.0).num_recoveries == 0
    recoveries.note(1, 10.0, is_running=False, is_ending=False)
    recoveries.note(2, 12.0, is_running=False, is_ending=False)
    assert recoveries.facts(13.0).under_way_s == 3.0
    recoveries.note(2, 14.0, is_running=True, is_ending=False)
    recoveries.note(2, 20.0, is_running=False, is_ending=True)  # asked to end
    facts = recoveries.facts(30.0)
    assert (facts.num_recoveries, facts.total_s, facts.last_s, facts.under_way_s) == (1, 4.0, 4.0, 0.0)
