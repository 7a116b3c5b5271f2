"""Skew is 1 where ranks and experts are loaded evenly, and says how much the busiest has more."""

from __future__ import annotations

import pytest

from k2dist.observe import LayerLoad, RankView, Skew, SkewWindow


def ranks(*rows: tuple[int, ...], peak: int = 0) -> list[RankView]:
    """One rank of two slots for each of `rows`, given by layer."""
    return [
        RankView(
            world_rank=index,
            lane=0,
            tp_rank=0,
            state="joined",
            layers=tuple(LayerLoad(num_rows=n, num_rows_peak=peak or n // 2, num_slots=2) for n in layers),
        )
        for index, layers in enumerate(rows)
    ]


def test_nothing_computed_has_no_skew() -> None:
    assert SkewWindow().note(ranks((0, 0), (0, 0)), 1.0) is None
    assert SkewWindow().note([], 1.0) is None


def test_even_load_is_one() -> None:
    assert SkewWindow().note(ranks((8, 4), (8, 4)), 1.0) == Skew(1.0, 1.0)


def test_the_busiest_rank_of_each_layer_counts() -> None:
    skew = SkewWindow().note(ranks((30, 10), (10, 10)), 1.0)
    assert skew is not None
    assert skew.over_ranks == pytest.approx((1.5 + 1.0) / 2)
    assert skew.over_experts == pytest.approx((15 * 4 / 40 + 5 * 4 / 20) / 2)


def test_what_lies_before_the_window_is_forgotten() -> None:
    window = SkewWindow(window_s=10.0)
    window.note(ranks((100,), (0,)), 0.0)
    window.note(ranks((100,), (100,)), 20.0)
    skew = window.note(ranks((200,), (200,)), 31.0)  # 100 each since 20 s
    assert skew is not None
    assert skew.over_ranks == 1.0


def test_a_rank_that_began_anew_begins_the_window_anew() -> None:
    window = SkewWindow()
    window.note(ranks((100,), (50,)), 0.0)
    skew = window.note(ranks((10,), (60,)), 1.0)
    assert skew is not None
    assert skew.over_ranks == pytest.approx(60 * 2 / 70)
