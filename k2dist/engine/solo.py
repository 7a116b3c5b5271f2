"""One sequence alone on one rank, which acts as a world of one: for checks, never for serving.

A rank of a larger world acts with what it holds: its own heads as if they were all heads, its own vocabulary
rows, and its own experts, of which each stands in for every expert that it lacks. Every operation of a step
then runs on the rank's real weights, and no other rank takes part.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import torch
from k2kernels import KernelSet
from msgspec.structs import replace
from torch import Tensor

from k2dist.checkpoint import load_shard
from k2dist.comm import Alone, Exchange
from k2dist.config import Architecture, read_architecture
from k2dist.engine.load import CPU
from k2dist.ids import SlotId, WorldRank
from k2dist.model import decoder
from k2dist.model.batch import Batch, PromptSegment
from k2dist.model.latent_cache import LatentCache
from k2dist.model.weights import assemble
from k2dist.parallel import RankPlace, first_layout, shard_plan

PAGE_TOKENS = 64


def solo_logits(model_dir: Path, token_ids: Sequence[int], kernels: KernelSet) -> Tensor:
    """Logits after each of `token_ids`, a prompt, float32 [T, V]. Loads the whole model for it."""
    architecture = read_architecture(model_dir)
    layout = first_layout(architecture, lanes=1, tp=1)
    place, num_tokens = layout.place(0), len(token_ids)
    tensors = load_shard(model_dir, shard_plan(architecture, layout, 0))
    with torch.inference_mode():
        return decoder.forward(
            solo_batch(
                num_tokens, PAGE_TOKENS, 0, num_tokens, is_prompt=True, token_T=torch.tensor(token_ids)
            ),
            assemble(tensors, architecture, place, layout.tp, kernels),
            solo_cache(architecture, num_tokens, PAGE_TOKENS, kernels),
            Alone(),
            solo_exchange(architecture, place),
            architecture,
            kernels,
        )


def solo_batch(
    num_tokens: int,
    page_tokens: int,
    start: int,
    stop: int,
    *,
    is_prompt: bool,
    token_T: Tensor | None = None,
    device: torch.device = CPU,
) -> Batch:
    """Rows [start, stop) of a sequence of `num_tokens`, whose page i is page i of the cache.

    Logits are wanted of every row. `is_prompt`: the decompressed path, else the absorbed one. `token_T`: the
    sequence, int64 [num_tokens]; without it ids are 0, for those who bring the stream themselves.
    """
    if token_T is None:
        token_T = torch.zeros(num_tokens, dtype=torch.int64)
    num_rows = stop - start
    position_T = torch.arange(start, stop)
    pages = torch.arange(num_pages(num_tokens, page_tokens))
    row_T = torch.arange(num_rows)
    row_R = row_T[:0] if is_prompt else row_T
    return Batch(
        token_T=token_T[start:stop],
        position_T=position_T,
        write_T=position_T,
        shares=(num_rows,),
        prompts=(PromptSegment(0, num_rows, start, pages),) if is_prompt else (),
        decode_row_R=row_R,
        decode_length_R=position_T[row_R] + 1,
        decode_page_RP=pages.expand(len(row_R), -1),
        sample_S=row_T,
    ).to(device)


def num_pages(num_tokens: int, page_tokens: int) -> int:
    return -(-num_tokens // page_tokens)


def solo_cache(
    architecture: Architecture,
    num_tokens: int,
    page_tokens: int,
    kernels: KernelSet,
    device: torch.device = CPU,
) -> LatentCache:
    return LatentCache.allocate(
        architecture, num_pages(num_tokens, page_tokens), page_tokens, kernels, device
    )


def solo_exchange(architecture: Architecture, place: RankPlace, device: torch.device = CPU) -> Exchange:
    """Expert e is in slot `solo_slot` of this rank, whatever is really there."""
    homes = [
        [
            (WorldRank(0), SlotId(solo_slot(expert, len(slots))))
            for expert in range(architecture.num_experts)
            if slots
        ]
        for slots in place.experts
    ]
    return Exchange(Alone(), homes, device)


IntOrTensor = TypeVar("IntOrTensor", int, Tensor)


def solo_slot(expert: IntOrTensor, num_slots: int) -> IntOrTensor:
    return expert % num_slots


def solo_architecture(architecture: Architecture, tp: int) -> Architecture:
    """What one tp rank computes, as a model of its own."""
    return replace(
        architecture,
        num_heads=architecture.num_heads // tp,
        intermediate_size=architecture.intermediate_size // tp,
        vocab_size=architecture.vocab_size // tp,
    )
