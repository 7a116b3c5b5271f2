"""Weights stream: the host lets go of a layer before it reads the next one, to where that one was."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor

from k2dist.checkpoint import CheckpointFiles, load_shard
from k2dist.config import read_architecture
from k2dist.engine.kernels import select_kernels
from k2dist.engine.load import ON_CPU, load_weights
from k2dist.engine.resident import SecondLook
from k2dist.model.weights import assemble
from k2dist.parallel import first_layout, shard_plan


@pytest.mark.parametrize("kernels", ["reference", "native"])
@pytest.mark.parametrize("rank", [0, 2], ids=["of a lane", "with experts alone"])
def test_at_most_one_layer_is_held(
    tiny_model_dir: Path, rank: int, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what kernels lay out anew: linears. Norms stay, in memory of their own."""
    architecture = read_architecture(tiny_model_dir)
    layout = first_layout(architecture, lanes=1, tp=2, expert_only_ranks=1)
    plan = shard_plan(architecture, layout, rank)
    read_all, held, reads = CheckpointFiles.read_all, [], []
    blocks: set[int] = set()

    def noted(files, part, *args, **named):  # type: ignore[no-untyped-def]
        gc.collect()
        reads.append(sum(any(ref() is not None for ref in refs) for refs in held))
        tensors: dict[str, Tensor] = read_all(files, part, *args, **named)
        if named.get("memory") is not None:  # not the ends: the embedding stays
            linears = [tensor for tensor in tensors.values() if tensor.dim() == 2]
            held.append([weakref.ref(tensor) for tensor in linears])
            blocks.update(tensor.untyped_storage().data_ptr() for tensor in linears)
        return tensors

    monkeypatch.setattr(CheckpointFiles, "read_all", noted)
    seen: list[int] = []
    chosen = select_kernels(kernels, "bfloat16")
    weights = load_weights(
        tiny_model_dir, plan, architecture, layout, chosen, ON_CPU, lambda done, _: seen.append(done)
    )
    assert len(reads) == architecture.num_layers + (rank < 2)
    assert max(reads) == 0
    assert len(blocks) <= 2, "layers differ in size, so that the first block may have been too small"
    assert seen == sorted(seen)
    assert seen[-1] == plan.num_bytes, "progress is of the whole shard"
    whole = assemble(load_shard(tiny_model_dir, plan), architecture, layout.place(rank), layout.tp, chosen)
    look = SecondLook({}, None)
    for layer, experts in enumerate(weights.experts):
        slots = layout.place(rank).experts[layer]
        assert not list(look.experts(experts, whole.experts[layer], layer + 1, slots))
    if weights.lane is not None and whole.lane is not None:
        assert torch.equal(weights.lane.embed_vD, whole.lane.embed_vD)
        assert len(weights.lane.layers) == len(whole.lane.layers)
