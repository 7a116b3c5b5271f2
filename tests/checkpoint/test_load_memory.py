"""Loading takes the memory of the weights and less than a tenth beyond, as the kernel counts it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import torch

from k2dist.checkpoint import CheckpointFiles, random_tensors, safetensors_file, write_checkpoint
from k2dist.config import Architecture
from k2dist.parallel import first_layout, shard_plan
from tests.published_config import published_config

# In a process of its own, whose peak can be set back: the most there ever was, and the weights that stay.
MEASURE = """
import dataclasses
import sys
from pathlib import Path
import torch
from k2kernels import KernelSet
from k2dist.checkpoint import load_shard
from k2dist.config import read_architecture
from k2dist.model.weights import assemble
from k2dist.parallel import first_layout, shard_plan

def kilobytes(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1])

def copied(parts):
    weights = torch.cat([part.w_NK.view(torch.uint8) for part in parts])
    return weights, torch.cat([part.scale_nk for part in parts])

def num_bytes(value):
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if isinstance(value, (tuple, list)):
        return sum(map(num_bytes, value))
    if dataclasses.is_dataclass(value):
        return sum(num_bytes(getattr(value, field.name)) for field in dataclasses.fields(value))
    return 0

def load(model_dir, how):
    architecture = read_architecture(model_dir)
    layout = first_layout(architecture, lanes=1, tp=2)
    tensors = load_shard(model_dir, shard_plan(architecture, layout, 1))
    if how == "once":
        return list(tensors.values())
    if how == "doubled":
        copies = [tensor.clone() for tensor in tensors.values()]
        return list(tensors.values())
    # As kernels that keep float8 weights lay them out: new tensors of the same size.
    kernels = dataclasses.replace(
        KernelSet.reference(),
        prepare_linear=copied,
        prepare_plain=lambda x: x.contiguous(),
        prepare_grouped=lambda slots, num_outputs: [copied(parts) for parts in slots],
    )
    return assemble(tensors, architecture, layout.place(1), layout.tp, kernels)

small_dir, large_dir, how = sys.argv[1:]
load(Path(small_dir), how)  # code that is first run here is not what is measured
Path("/proc/self/clear_refs").write_text("5")
before = kilobytes("VmRSS")
weights = load(Path(large_dir), how)
print((kilobytes("VmHWM") - before) * 1024, num_bytes(weights))
"""


LINUX = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks as Linux counts them")


@pytest.fixture(scope="module")
def large(small: Architecture) -> Architecture:
    """Tens of megabytes, so that what a process costs anyway is small beside them; and so many layers that
    one of them, which exists twice while it is laid out, is a small share of all, as in K2 (1 of 61)."""
    return msgspec.structs.replace(
        small, hidden_size=512, moe_intermediate_size=256, num_experts=8, num_layers=48, vocab_size=4096
    )


@pytest.fixture(scope="module")
def large_dir(tmp_path_factory: pytest.TempPathFactory, large: Architecture) -> Path:
    model_dir = tmp_path_factory.mktemp("large")
    write_checkpoint(model_dir, large, random_tensors(large, seed=4))
    (model_dir / "config.json").write_text(json.dumps(published_config(large)))
    return model_dir


def peak_and_weights(small_dir: Path, large_dir: Path, how: str) -> tuple[int, int]:
    output = subprocess.run(
        [sys.executable, "-c", MEASURE, str(small_dir), str(large_dir), how],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
        # Tensors are given back when they are freed: what is counted is what was held, not what malloc keeps.
        env=os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
    ).stdout
    peak, weights = map(int, output.split())
    return peak, weights


@LINUX
@pytest.mark.parametrize("how", ["once", "assembled"])
def test_loading_takes_a_tenth_more_than_the_weights_at_most(
    tiny_model_dir: Path, large_dir: Path, how: str
) -> None:
    """Read; and read and laid out by kernels that make copies."""
    peak, weights = peak_and_weights(tiny_model_dir, large_dir, how)
    assert weights > 30e6
    assert 0.95 * weights < peak < 1.1 * weights


@LINUX
def test_a_second_copy_would_be_seen(tiny_model_dir: Path, large_dir: Path) -> None:
    peak, weights = peak_and_weights(tiny_model_dir, large_dir, "doubled")
    assert peak > 1.8 * weights


def test_pieces_of_one_tensor_are_read_apart(
    large_dir: Path, large: Architecture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With pieces much smaller than tensors, rows and columns alike, the bytes are the same."""
    plan = shard_plan(large, first_layout(large, lanes=1, tp=4), 1)
    with CheckpointFiles(large_dir) as files:
        whole = files.read_all(plan)
    monkeypatch.setattr(safetensors_file, "PIECE_BYTES", 4000)
    seen: list[int] = []
    with CheckpointFiles(large_dir) as files:
        parted = files.read_all(plan, lambda done, total: seen.append(done), num_threads=3)
        assert files.num_bytes_read == plan.num_bytes
    assert len(seen) > 5 * len(plan.reads)
    assert seen == sorted(seen)
    assert seen[-1] == plan.num_bytes
    assert parted.keys() == whole.keys()
    for name, tensor in parted.items():
        assert torch.equal(tensor.view(torch.uint8), whole[name].view(torch.uint8)), name
