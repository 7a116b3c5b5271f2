"""Steps of every size before a rank joins anybody: their kernels are compiled, and memory has been asked for.

The rank acts its part in the world's real shapes, and its peers are made up (`comm.rehearsal`). So a rank
that compiles for minutes keeps nobody waiting at a collective, and one that replaces another in a new
generation has done so before the others meet it.
"""

from __future__ import annotations

import torch

from k2dist.comm import Exchange, RehearsalCommunicator
from k2dist.engine.form import Form, FormRule
from k2dist.engine.forward import ForwardPass, Model, StagedBatch
from k2dist.engine.recording import Note
from k2dist.engine.shares import even_shares
from k2dist.model.batch import Batch, PromptSegment
from k2dist.model.latent_cache import LatentCache
from k2dist.parallel import Layout, expert_homes
from k2dist.scheduler import Limits


def warm_up(
    model: Model,
    layout: Layout,
    world_rank: int,
    rule: FormRule,
    limits: Limits,
    note: Note = lambda *_: None,
) -> None:
    """Prompts of up to as many rows as a step takes, halved again and again; then every bucket of `rule`, of
    rows that are none.

    Prompts are written to the first pages of the cache, which nobody has yet. A rank without a lane has none,
    and made-up peers send it none.
    """
    place = layout.place(world_rank)
    num_layers = model.architecture.num_moe_layers
    homes = [expert_homes(layout, layer, place.world_rank) for layer in range(num_layers)]
    world = RehearsalCommunicator(world_rank, layout.world_size)
    lane = None if place.tp_rank is None else RehearsalCommunicator(place.tp_rank, layout.tp)
    exchange = Exchange(world, homes, model.device)
    passes = ForwardPass(model, lane, exchange, rule.buckets[0] if rule.buckets else None)
    batches = [] if model.cache is None else _prompt_batches(limits, model.cache, layout.tp)
    num_sizes = len(batches) + len(rule.buckets)
    with torch.inference_mode():
        for number, batch in enumerate(batches, 1):
            passes.exactly(StagedBatch(batch, Form(), None))
            _wait(model.device)
            note(number, num_sizes)
        for number, bucket in enumerate(rule.buckets, 1 + len(batches)):
            passes.try_out(rule.recorded(bucket))
            _wait(model.device)
            note(number, num_sizes)


def _wait(device: torch.device) -> None:
    """What is wrong shows here, and not in the middle of something else."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _prompt_batches(limits: Limits, cache: LatentCache, tp: int) -> list[Batch]:
    """Descending. Kernels choose how they cut their work by rows, at powers of two."""
    num_pages = cache.first_spare // cache.page_tokens
    chunk_tokens = min(limits.chunk_tokens, len(cache.rope.cos_PF), cache.first_spare)
    num_chunks = num_pages // -(-chunk_tokens // cache.page_tokens)
    most_rows = min(limits.step_tokens, num_chunks * chunk_tokens)
    sizes = [most_rows, *(1 << k for k in reversed(range(most_rows.bit_length())) if 1 << k < most_rows)]
    return [_prompts(num_rows, chunk_tokens, cache.page_tokens, tp) for num_rows in sizes]


def _prompts(num_rows: int, chunk_tokens: int, page_tokens: int, tp: int) -> Batch:
    """Prompts one behind the other, each a chunk or what is left; of each the last row samples."""
    chunk_pages = -(-chunk_tokens // page_tokens)
    segments = tuple(
        PromptSegment(
            row=start,
            num_rows=min(chunk_tokens, num_rows - start),
            start=0,
            page_table=torch.arange(chunk_pages) + start // chunk_tokens * chunk_pages,
        )
        for start in range(0, num_rows, chunk_tokens)
    )
    row_T, none = torch.arange(num_rows), torch.empty(0, dtype=torch.int64)
    position_T = row_T % chunk_tokens
    return Batch(
        token_T=torch.zeros_like(row_T),
        position_T=position_T,
        write_T=row_T // chunk_tokens * chunk_pages * page_tokens + position_T,
        shares=even_shares(num_rows, tp),
        prompts=segments,
        decode_row_R=none,
        decode_length_R=none,
        decode_page_RP=none.view(0, 0),
        sample_S=torch.tensor([segment.row + segment.num_rows - 1 for segment in segments]),
    )
