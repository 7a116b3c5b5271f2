"""`KernelSet.triton()`: complete, loaded late, and the same model as the reference's."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from k2kernels import Experts, KernelSet, StoredWeight

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
# Of the largest value: two correct bfloat16 paths differ by roundings; float32 ones by the order of sums.
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-5}


def stored(rows: int, cols: int) -> StoredWeight:
    w_NK = (torch.randn(rows, cols) * 50).clamp(-448, 448).to(torch.float8_e4m3fn)
    return StoredWeight(w_NK, torch.rand(-(-rows // 32), -(-cols // 32)) / 1000, 32)


def test_triton_is_loaded_at_the_first_launch_and_not_before() -> None:
    program = "import sys, k2kernels; raise SystemExit('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@DTYPES
def test_an_experts_output_is_that_of_a_plain_mlp(dtype: torch.dtype, device: torch.device) -> None:
    """The same bits: an expert that ran on another rank, among other experts, changes nothing."""
    kernels, plain = KernelSet.triton(dtype), KernelSet.reference(dtype)
    parts = [(stored(64, 96), stored(64, 96), stored(96, 64)) for _ in range(3)]
    gate_up, down = [part[:2] for part in parts], [part[2:] for part in parts]
    experts = Experts(kernels.prepare_grouped(gate_up, 128), kernels.prepare_grouped(down, 96))
    twins = Experts(plain.prepare_grouped(gate_up, 128), plain.prepare_grouped(down, 96))
    x_ND = torch.randn(6, 96).to(dtype)
    row_M, slot_M = torch.tensor([4, 0, 1, 2, 4, 5, 5]), torch.tensor([0, 0, 1, 1, 1, 1, 2])
    rows = kernels.wire_unpack(kernels.wire_pack(x_ND, 32), 96, 32)
    out_MD = kernels.experts(rows, row_M, slot_M.bincount(), experts)
    wanted_MD = plain.experts(
        plain.wire_unpack(plain.wire_pack(x_ND, 32), 96, 32), row_M, slot_M.bincount(), twins
    )
    largest = wanted_MD.abs().max().item()
    assert torch.allclose(out_MD.float(), wanted_MD.float(), rtol=0, atol=TOLERANCE[dtype] * largest)
    for slot in range(3):
        of_slot_M = slot_M == slot
        gate, up, last = parts[slot]
        alone = kernels.mlp(
            x_ND[row_M[of_slot_M]], kernels.prepare_linear([gate, up]), kernels.prepare_linear([last])
        )
        assert torch.equal(out_MD[of_slot_M], alone)


def test_no_op_is_the_references(device: torch.device) -> None:
    kernels, plain = KernelSet.triton(), KernelSet.reference()
    callables = [f.name for f in dataclasses.fields(KernelSet) if callable(getattr(plain, f.name))]
    assert len(callables) > 15
    assert not [name for name in callables if getattr(kernels, name) is getattr(plain, name)]
    assert "triton" in kernels.fingerprint()


@pytest.mark.slow  # two minutes of interpreting
@DTYPES
def test_the_model_computes_what_it_computes_with_the_reference(
    dtype: torch.dtype, device: torch.device, tiny_model_dir: Path
) -> None:
    """A prompt and six generated rows through every layer, each half layer held against float64."""
    from k2dist.checkpoint import load_shard
    from k2dist.config import read_architecture
    from k2dist.engine.kernel_check import TOLERANCE, KernelCheck
    from k2dist.model.weights import assemble
    from k2dist.parallel import first_layout, shard_plan

    if device.type == "cuda":
        pytest.skip("the check's own batch and float64 twin are made on the CPU")
    architecture, kernels = read_architecture(tiny_model_dir), KernelSet.triton(dtype)
    layout = first_layout(architecture, lanes=1, tp=1)
    tensors = load_shard(tiny_model_dir, shard_plan(architecture, layout, 0))
    weights = assemble(dict(tensors), architecture, layout.place(0), 1, kernels)
    assert weights.lane is not None
    check = KernelCheck(architecture, layout.place(0), 1, 64, kernels)
    check.begin(weights.lane)
    faults = []
    for index, layer in enumerate(weights.lane.layers):
        experts = weights.experts[index - 1] if architecture.is_moe_layer(index) else None
        faults += check.layer(index, layer, experts, tensors)
    faults += check.head(weights.lane, tensors)
    assert not faults
    assert 0 < check.worst < TOLERANCE[dtype][1]
