"""A static batch holds a step's rows and rows that are none, at the same addresses in every step."""

from __future__ import annotations

import dataclasses

import torch
from k2kernels import KernelSet

from k2dist.config import read_architecture
from k2dist.engine.staging import Staging
from k2dist.engine.static_batch import StaticBatch, StaticRoom
from k2dist.model.batch import Batch
from k2dist.model.latent_cache import LatentCache
from k2dist.parallel.buckets import Bucket, spare_places

CPU, PAGE_TOKENS, NUM_PAGES, BUCKET = torch.device("cpu"), 4, 6, Bucket(5, 3)


def cache(tiny_model_dir) -> LatentCache:  # type: ignore[no-untyped-def]
    kernels = KernelSet.reference(torch.float32)
    architecture = read_architecture(tiny_model_dir)
    return LatentCache.allocate(
        architecture, NUM_PAGES, PAGE_TOKENS, kernels, num_spare=spare_places(BUCKET.rows)
    )


def decodes(num_rows: int, samples: list[int]) -> Batch:
    pages_RP = torch.tensor([[5, 2], [3, 0], [1, 0]])[:num_rows]
    position_T = torch.tensor([6, 1, 2])[:num_rows]
    return Batch(
        token_T=torch.tensor([11, 12, 13])[:num_rows],
        position_T=position_T,
        write_T=torch.tensor([10, 13, 6])[:num_rows],
        shares=(num_rows, 0),
        prompts=(),
        decode_row_R=torch.arange(num_rows),
        decode_length_R=position_T + 1,
        decode_page_RP=pages_RP,
        sample_S=torch.tensor(samples, dtype=torch.int64),
    )


def addresses(static: StaticBatch) -> list[int]:
    batch = static.batch
    return [x.data_ptr() for x in vars_of(batch) if isinstance(x, torch.Tensor)]


def vars_of(batch: Batch) -> list[object]:
    return [getattr(batch, field.name) for field in dataclasses.fields(batch)]


def test_rows_behind_the_steps_are_none_and_nothing_moves(tiny_model_dir) -> None:  # type: ignore[no-untyped-def]
    latents = cache(tiny_model_dir)
    rooms = [StaticRoom(Bucket(8, 4), 16, torch.float32, CPU) for _ in range(2)]  # larger than is needed
    ranks = [StaticBatch(BUCKET, 2, tp_rank, latents, room) for tp_rank, room in enumerate(rooms)]
    staging, before = rooms[0].staging, addresses(ranks[0])
    for num_rows, samples in ((3, [2, 0]), (0, []), (1, [0]), (3, [0, 1, 2])):
        batch = decodes(num_rows, samples)
        staged = staging.put(
            lambda host, batch=batch: ranks[0].fill_(host, batch),  # type: ignore[misc]
            BUCKET.num_ints,
        )
        for static in ranks:
            staged.copy_to_(static.buffer)
            static.put_tokens_(batch.token_T)
            static.batch.check()
            assert static.batch.shares == (3, 2)
            assert torch.equal(static.batch.token_T[:num_rows], batch.token_T)
            assert torch.equal(static.batch.write_T[:num_rows], batch.write_T) or num_rows == 0
            assert torch.equal(static.batch.sample_S[: len(samples)], batch.sample_S)
            assert torch.equal(static.batch.decode_page_RP[:num_rows, :2], batch.decode_page_RP)
        is_row = torch.cat([static.is_own_row() for static in ranks])
        assert is_row.tolist() == [row < num_rows for row in range(5)]
        write_N = ranks[0].batch.write_T[num_rows:]
        assert write_N.min() > latents.first_spare, "the first spare place is read, and nobody writes it"
        assert write_N.max() < len(latents.layers[0])
    assert addresses(ranks[0]) == before


def test_a_buffer_is_not_filled_again_before_the_step_after_the_next() -> None:
    staging = Staging(2, CPU)
    first, second = (staging.put(lambda host, n=n: host.fill_(n), 2) for n in (1, 2))  # type: ignore[misc]
    out = torch.zeros(2, dtype=torch.int64)
    first.copy_to_(out)
    assert out.tolist() == [1, 1]
    second.copy_to_(out)
    assert out.tolist() == [2, 2]
    assert staging.put(lambda host: None, 2) is first


def test_a_smaller_size_writes_no_more_than_its_own_numbers() -> None:
    staging, out = Staging(4, CPU), torch.zeros(4, dtype=torch.int64)
    for _ in range(2):
        staging.put(lambda host: host.fill_(7), 4).copy_to_(out)
    staging.put(lambda host: host.fill_(1), 2).copy_to_(out[:2])
    assert out.tolist() == [1, 1, 7, 7]
