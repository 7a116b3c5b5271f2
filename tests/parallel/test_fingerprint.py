"""Ranks that differ are found, by field and by rank; what must be equal always is told from the rest."""

from msgspec.structs import replace

from k2dist.parallel.fingerprint import MUST_EQUAL, Fingerprint, Introduction, differences

ONE = Fingerprint(
    k2dist="0.1.0 aaaa",
    model="bbbb",
    dtype="bfloat16",
    tp=2,
    kernels="native",
    kernel_versions=("amx", "cccc"),
    torch="2.13.0",
    device="CPU AVX512",
)
OTHER = {
    "k2dist": "0.2.0 dddd",
    "model": "eeee",
    "dtype": "float32",
    "tp": 4,
    "kernels": "reference",
    "kernel_versions": ("avx2", "cccc"),
    "torch": "2.12.0",
    "device": "CPU AVX2",
}


def world(*prints: Fingerprint) -> list[Introduction]:
    return [
        Introduction(world_rank=rank, node=f"10.0.0.{rank}", fingerprint=each)
        for rank, each in enumerate(prints)
    ]


def test_equal_ranks_differ_in_nothing() -> None:
    assert differences(world(ONE, ONE, ONE)) == ()
    assert differences(world(ONE)) == ()


def test_every_field_is_compared_and_both_ranks_are_named() -> None:
    assert tuple(OTHER) == Fingerprint.__struct_fields__
    for field, value in OTHER.items():
        (found,) = differences(world(ONE, ONE, replace(ONE, **{field: value}), ONE))
        assert (found.field, found.ranks, found.nodes) == (field, (0, 2), ("10.0.0.0", "10.0.0.2"))
        assert found.is_forbidden == (field in MUST_EQUAL)


def test_a_difference_says_field_ranks_nodes_and_values() -> None:
    (found,) = differences(world(ONE, replace(ONE, torch="2.12.0")))
    assert str(found) == "torch is 2.13.0 on rank 0 (10.0.0.0) and 2.12.0 on rank 1 (10.0.0.1)"


def test_one_rank_may_differ_in_several_fields_and_several_ranks_in_one() -> None:
    found = differences(world(ONE, replace(ONE, torch="2.12.0", tp=4), replace(ONE, torch="2.11.0")))
    assert [(each.field, each.ranks) for each in found] == [("tp", (0, 1)), ("torch", (0, 1))]
