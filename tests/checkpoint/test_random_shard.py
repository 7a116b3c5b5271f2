"""Made-up shards look like read ones: names, dtypes, shapes, and values that a model can be made of."""

from pathlib import Path

import torch
from k2kernels.fp8_gemm import StoredWeight, dequantise

from k2dist.checkpoint import RandomShard, load_shard
from k2dist.config import read_architecture
from k2dist.parallel import first_layout, shard_plan

CPU = torch.device("cpu")


def test_it_has_the_form_of_a_shard_that_was_read(tiny_model_dir: Path) -> None:
    architecture = read_architecture(tiny_model_dir)
    layout = first_layout(architecture, lanes=1, tp=2, expert_only_ranks=1)
    for rank in range(layout.world_size):
        plan = shard_plan(architecture, layout, rank)
        made = RandomShard(architecture.scale_block, CPU).tensors(plan.reads)
        read = load_shard(tiny_model_dir, plan)
        assert list(made) == list(read)
        for name, tensor in made.items():
            assert (tensor.dtype, tensor.shape) == (read[name].dtype, read[name].shape), name
            assert tensor.is_contiguous()
        assert sum(tensor.nbytes for tensor in made.values()) == plan.num_bytes


def test_values_are_finite_and_as_wide_as_a_models(tiny_model_dir: Path) -> None:
    architecture = read_architecture(tiny_model_dir)
    plan = shard_plan(architecture, first_layout(architecture, lanes=1, tp=1), 0)
    made = RandomShard(architecture.scale_block, CPU).tensors(plan.reads)
    assert all(tensor.float().isfinite().all() for tensor in made.values())
    names = [name for name in made if name.endswith("gate_proj.weight")]
    weights = [
        dequantise(StoredWeight(made[name], made[f"{name}_scale_inv"], architecture.scale_block))
        for name in names
    ]
    spread = torch.cat(weights).std() * architecture.hidden_size**0.5
    assert abs(spread - 1.0) < 0.1, "a linear keeps the variance of its input"
    assert abs(made["model.norm.weight"].float().mean() - 1.0) < 0.05


def test_a_name_and_a_seed_decide_every_value(tiny_model_dir: Path) -> None:
    architecture = read_architecture(tiny_model_dir)
    reads = shard_plan(architecture, first_layout(architecture, lanes=1, tp=1), 0).reads
    first = RandomShard(architecture.scale_block, CPU, seed=3).tensors(reads)
    again = RandomShard(architecture.scale_block, CPU, seed=3).tensors(reversed(reads))
    other = RandomShard(architecture.scale_block, CPU, seed=4).tensors(reads)
    name = "model.layers.2.mlp.experts.0.down_proj.weight"
    twin = name.replace("experts.0", "experts.1")
    assert all(torch.equal(first[n].view(torch.uint8), again[n].view(torch.uint8)) for n in first)
    assert not torch.equal(first[name].view(torch.uint8), other[name].view(torch.uint8))
    assert not torch.equal(first[name].view(torch.uint8), first[twin].view(torch.uint8))
