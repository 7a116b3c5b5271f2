"""Ranks as threads over one store: all come to the same end, before any group is made."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
from msgspec.structs import replace
from torch.distributed import HashStore

from k2dist.comm.introductions import introduce
from k2dist.errors import ConfigError, PeerError
from k2dist.ids import Generation
from k2dist.parallel.fingerprint import Fingerprint, Introduction

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


def meet(
    prints: Sequence[Fingerprint], *, allows_mix: bool = False, num_ranks: int | None = None
) -> list[object]:
    """What `introduce` gives or raises on each rank; ranks beyond `prints` never come."""
    store = HashStore()

    def rank_main(rank: int) -> object:
        own = Introduction(world_rank=rank, node=f"10.0.0.{rank}", fingerprint=prints[rank])
        try:
            return introduce(
                store,
                own,
                generation=Generation(1),
                num_ranks=num_ranks or len(prints),
                allows_mix=allows_mix,
                deadline_s=0.2 if num_ranks else 30.0,
            )
        except (ConfigError, PeerError) as error:
            return error

    with ThreadPoolExecutor(len(prints)) as pool:
        return list(pool.map(rank_main, range(len(prints))))


def test_ranks_that_are_alike_go_on() -> None:
    assert meet([ONE] * 4) == [()] * 4


def test_two_different_fingerprints_are_refused_by_every_rank_with_one_message() -> None:
    results = meet([ONE, ONE, replace(ONE, kernel_versions=("avx2", "cccc"))])
    assert {type(result) for result in results} == {ConfigError}
    (message,) = {str(result) for result in results}
    assert "kernel_versions is amx cccc on rank 0 (10.0.0.0) and avx2 cccc on rank 2 (10.0.0.2)" in message
    assert "ranks.allow_mix" in message


def test_a_mix_that_is_allowed_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        results = meet([ONE, replace(ONE, device="CPU AVX2")], allows_mix=True)
    assert [[each.field for each in result] for result in results] == [["device"], ["device"]]
    assert "ranks.mixed device is CPU AVX512 on rank 0" in caplog.text


def test_no_mix_of_models_is_allowed() -> None:
    results = meet([ONE, replace(ONE, model="other", device="CPU AVX2")], allows_mix=True)
    assert {type(result) for result in results} == {ConfigError}
    assert "model is bbbb on rank 0" in str(results[0])
    assert "device" not in str(results[0])
    assert "allow_mix" not in str(results[0])


def test_who_does_not_come_is_named() -> None:
    results = meet([ONE, ONE], num_ranks=3)
    assert [type(result) for result in results] == [PeerError, PeerError]
    assert "rank 2 did not introduce itself within 0.2 s" in str(results[0])
