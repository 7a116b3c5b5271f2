"""Half layers and layers in one call give the bits of their steps, for every instruction set here."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from k2kernels import KernelSet
from k2kernels.native import NoNativeKernelsError, load
from torch import Tensor

from k2dist.checkpoint import load_shard
from k2dist.comm import Alone
from k2dist.config import read_architecture
from k2dist.engine.solo import solo_batch, solo_cache, solo_exchange
from k2dist.model import decoder
from k2dist.model.moe import rule
from k2dist.model.weights import assemble
from k2dist.parallel import first_layout, shard_plan

PAGE_TOKENS = 16
try:
    ISAS = list(load().isas)
except NoNativeKernelsError:
    ISAS = []

pytestmark = pytest.mark.skipif(not ISAS, reason="no native kernels were built here")


class Rank:
    """One rank with all of a model. `step`: a prompt, then generated rows: logits, latents and loads."""

    def __init__(self, model_dir: Path, kernels: KernelSet) -> None:
        self.architecture = read_architecture(model_dir)
        layout = first_layout(self.architecture, lanes=1, tp=1)
        tensors = load_shard(model_dir, shard_plan(self.architecture, layout, 0))
        self.place = layout.place(0)
        self.weights = assemble(tensors, self.architecture, self.place, 1, kernels)

    def step(self, kernels: KernelSet, num_known: int, num_rows: int) -> tuple[Tensor, Tensor, object]:
        num_tokens = num_known + num_rows
        cache = solo_cache(self.architecture, num_tokens, PAGE_TOKENS, kernels)
        for layer_CD in cache.layers:
            layer_CD.fill_(float("nan"))  # of places that nobody wrote
        exchange = solo_exchange(self.architecture, self.place)
        token_T = torch.arange(num_tokens) * 7 % self.architecture.vocab_size
        logits = torch.empty(0)
        with torch.inference_mode():
            for start, stop, is_prompt in ((0, num_known, True), (num_known, num_tokens, False)):
                batch = solo_batch(num_tokens, PAGE_TOKENS, start, stop, is_prompt=is_prompt, token_T=token_T)
                batch.check()
                logits = decoder.forward(
                    batch, self.weights, cache, Alone(), exchange, self.architecture, kernels
                )
        return logits, torch.stack(cache.layers)[:, :num_tokens], exchange.expert_load()


@pytest.mark.parametrize("isa", ISAS)
def test_layers_and_halves_in_one_call_are_their_steps(tiny_model_dir: Path, isa: str) -> None:
    whole = KernelSet.native(isa)
    assert whole.whole_attention is not None
    assert whole.whole_moe is not None
    assert whole.whole_layers is not None
    in_halves = dataclasses.replace(whole, whole_layers=None)
    in_steps = dataclasses.replace(in_halves, whole_attention=None, whole_moe=None)
    rank = Rank(tiny_model_dir, whole)
    for num_known, num_rows in ((1, 1), (60, 3), (70, 21)):
        wanted_logits, wanted_latents, wanted_load_Le = rank.step(in_steps, num_known, num_rows)
        assert bool(wanted_logits.isfinite().all())
        for kernels in (whole, in_halves):
            logits, latents, load_Le = rank.step(kernels, num_known, num_rows)
            assert torch.equal(logits, wanted_logits)
            assert torch.equal(latents, wanted_latents)
            assert load_Le == wanted_load_Le


@pytest.mark.parametrize("isa", ISAS)
def test_threads_move_no_bit_of_a_half_layer(tiny_model_dir: Path, isa: str) -> None:
    alone, many = KernelSet.native(isa, 1), KernelSet.native(isa, 3)
    rank = Rank(tiny_model_dir, alone)
    assert torch.equal(rank.step(alone, 70, 21)[0], rank.step(many, 70, 21)[0])


def test_wrong_arguments_are_named(tiny_model_dir: Path) -> None:
    kernels = KernelSet.native()
    assert kernels.whole_moe is not None
    rank = Rank(tiny_model_dir, kernels)
    assert rank.weights.lane is not None
    layer = next(x for x in rank.weights.lane.layers if hasattr(x.mlp, "router"))
    x_TD = torch.zeros(2, rank.architecture.hidden_size, dtype=torch.bfloat16)
    slot_E = torch.zeros(rank.architecture.num_experts - 1, dtype=torch.int32)
    how = rule(rank.architecture)
    with pytest.raises(AssertionError, match="every expert has a slot"):
        kernels.whole_moe(x_TD, layer.mlp.router, how, layer.mlp.shared, rank.weights.experts[0], slot_E)
