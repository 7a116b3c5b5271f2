"""Bytes and seconds of one load, told as they come."""

from k2dist.engine.load_progress import LoadProgress
from k2dist.messages import RankProgress


def test_seconds_up_to_the_first_bytes_and_from_there_to_the_last() -> None:
    told: list[RankProgress] = []
    now_s = iter([10.0, 12.0, 12.5, 15.0])
    progress = LoadProgress(30, told.append, lambda: next(now_s))
    for num_bytes in (10, 20, 30):
        progress.loaded(num_bytes, 30)
    progress.tested(15, 30)
    assert [(each.find_s, each.read_s) for each in told] == [(2.0, 0.0), (2.0, 0.5), (2.0, 3.0), (2.0, 3.0)]
    assert [each.num_bytes_loaded for each in told] == [10, 20, 30, 30]
    assert told[-1].num_bytes_tested == 15
    progress.warmed(3, 12)
    assert (told[-1].num_sizes_warm, told[-1].num_sizes, told[-1].num_bytes_tested) == (3, 12, 15)
