"""Which form a step has follows from what all ranks have agreed on, and from nothing else."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from k2dist.comm import CapacityRule, StepAgreement, combine
from k2dist.engine.form import Form, FormRule
from k2dist.ids import Generation
from k2dist.parallel.buckets import Bucket

PADDING = CapacityRule(factor=1.25, top_k=8, largest_share=24 / 384)


def agreed(num_rows: int, num_pages: int = 1, *, prompts: bool = False) -> StepAgreement:
    return StepAgreement(
        generation=Generation(0),
        step=3,
        num_rows=num_rows,
        is_idle=False,
        is_stopping=False,
        has_prompts=prompts,
        has_decodes=True,
        num_pages=num_pages,
    )


def rule(
    *,
    tp: int = 1,
    world_size: int = 16,
    padding: CapacityRule | None = PADDING,
    split_tokens: int | None = None,
) -> FormRule:
    return FormRule.of(
        tp=tp,
        world_size=world_size,
        padding=padding,
        most_rows=200,
        most_pages=2048,
        split_tokens=split_tokens,
    )


def test_buckets_reach_from_one_row_to_the_most() -> None:
    found = rule().buckets
    assert sorted({bucket.rows for bucket in found}) == [
        *(1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 200)
    ]
    assert sorted({bucket.pages for bucket in found}) == [16, 64, 256, 1024, 2048]
    assert len(set(found)) == 14 * 5
    short = FormRule.of(tp=1, world_size=1, padding=None, most_rows=1, most_pages=3, split_tokens=None)
    assert short.buckets == (Bucket(1, 3),)


def test_the_first_bucket_has_room_for_what_all_others_hold() -> None:
    first, *others = rule().buckets
    assert all(first.num_ints > other.num_ints for other in others)
    assert all(first.rows >= other.rows and first.pages >= other.pages for other in others)


def test_a_size_that_was_not_recorded_is_taken_in_the_next_larger_one() -> None:
    some = rule().only((Bucket(192, 2048), Bucket(64, 64), Bucket(16, 2048)))
    assert some.form(agreed(3, 3)).bucket == Bucket(16, 2048), "fewer rows before fewer pages"
    assert some.form(agreed(17, 64)).bucket == Bucket(64, 64)
    assert some.form(agreed(17, 65)).bucket == Bucket(192, 2048)
    assert some.form(agreed(193)) == Form(PADDING.capacity(193)), "eager"


def test_a_step_of_generated_rows_is_taken_in_the_smallest_bucket_that_holds_it() -> None:
    assert rule().form(agreed(13, 17)) == Form(PADDING.capacity(16), Bucket(16, 64))
    assert rule(tp=4).form(agreed(13, 17)) == Form(PADDING.capacity(4), Bucket(16, 64)), "of a rank's share"
    assert rule(world_size=1, padding=None).form(agreed(200, 2048)) == Form(None, Bucket(200, 2048))


def test_what_cannot_be_recorded_is_eager() -> None:
    assert rule().form(agreed(13, prompts=True)) == Form()
    assert rule().only(()).form(agreed(13)) == Form(PADDING.capacity(13))
    assert rule().form(agreed(201)) == Form(PADDING.capacity(201))
    assert rule().form(agreed(13, 2049)) == Form(PADDING.capacity(13))
    assert rule(padding=None).buckets == (), "what travels needs a capacity"
    assert rule(padding=None).form(agreed(13)) == Form()


def test_only_exact_steps_with_enough_rows_are_split() -> None:
    assert rule(split_tokens=64).form(agreed(64, prompts=True)) == Form(num_parts=2)
    assert rule(split_tokens=64).form(agreed(63, prompts=True)) == Form()
    assert rule(split_tokens=64, padding=None).form(agreed(64)) == Form(num_parts=2)
    assert rule(split_tokens=64).form(agreed(64)).num_parts == 1


@given(
    words=st.lists(st.builds(agreed, st.integers(0, 250), st.integers(0, 3000)), min_size=1).filter(
        lambda words: any(word.num_rows for word in words)
    ),  # without rows no step is launched
    padding=st.sampled_from([None, PADDING]),
)
def test_every_rank_has_room_in_the_form_that_all_take(
    words: list[StepAgreement], padding: CapacityRule | None
) -> None:
    found = rule(padding=padding).form(combine(words))
    if found.bucket is not None:
        assert found.bucket.rows >= max(word.num_rows for word in words)
        assert found.bucket.pages >= max(word.num_pages for word in words)
        assert found.capacity is not None
