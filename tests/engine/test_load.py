"""Weights stream: the host lets go of a layer before it reads the next one."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch
from k2kernels import KernelSet
from torch import Tensor

from k2dist.checkpoint import CheckpointFiles, load_shard
from k2dist.config import read_architecture
from k2dist.engine.load import ON_CPU, load_weights
from k2dist.engine.resident import SecondLook
from k2dist.model.weights import assemble
from k2dist.parallel import first_layout, shard_plan


@pytest.mark.parametrize("rank", [0, 2], ids=["of a lane", "with experts alone"])
def test_at_most_one_layer_is_held(tiny_model_dir: Path, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what kernels lay out anew: linears. Norms stay what they were."""
    architecture = read_architecture(tiny_model_dir)
    layout = first_layout(architecture, lanes=1, tp=2, expert_only_ranks=1)
    plan = shard_plan(architecture, layout, rank)
    read_all, held, reads = CheckpointFiles.read_all, [], []

    def noted(files, part, *args):  # type: ignore[no-untyped-def]
        gc.collect()
        reads.append(sum(ref().nbytes for ref in held if ref() is not None))
        tensors: dict[str, Tensor] = read_all(files, part, *args)
        held.extend(weakref.ref(tensor) for tensor in tensors.values() if tensor.dim() == 2)
        return tensors

    monkeypatch.setattr(CheckpointFiles, "read_all", noted)
    seen: list[int] = []
    kernels = KernelSet.reference(torch.float32)
    weights = load_weights(
        tiny_model_dir, plan, architecture, layout, kernels, ON_CPU, lambda done, _: seen.append(done)
    )
    assert len(reads) == architecture.num_layers + (rank < 2)
    assert max(reads) == 0
    assert seen == sorted(seen)
    assert seen[-1] == plan.num_bytes, "progress is of the whole shard"
    whole = assemble(load_shard(tiny_model_dir, plan), architecture, layout.place(rank), layout.tp, kernels)
    look = SecondLook({}, None)
    for layer, experts in enumerate(weights.experts):
        slots = layout.place(rank).experts[layer]
        assert not list(look.experts(experts, whole.experts[layer], layer + 1, slots))
    if weights.lane is not None and whole.lane is not None:
        assert torch.equal(weights.lane.embed_vD, whole.lane.embed_vD)
        assert len(weights.lane.layers) == len(whole.lane.layers)
