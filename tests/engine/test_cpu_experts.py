"""Experts' weights may stay on the CPU, and are then computed there with the CPU's best kernels.

Without a GPU the rest is another kernel set: what goes between them is what goes between devices.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from k2kernels import Experts, KernelSet, StoredWeight
from k2kernels.native import NoNativeKernelsError

from k2dist.config import read_architecture
from k2dist.engine import LocalWorld
from k2dist.engine.kernels import select_kernels, with_cpu_experts
from k2dist.engine.load import Places
from k2dist.engine.local import Generated
from k2dist.errors import ConfigError
from k2dist.messages import Sampling
from k2dist.parallel import first_layout
from k2dist.scheduler import Limits

SAMPLING = Sampling(temperature=0.0, max_tokens=6, ignore_eos=True, logprobs=3)


def native() -> KernelSet:
    try:
        return KernelSet.native()
    except NoNativeKernelsError as error:
        pytest.skip(str(error))


def run(
    model_dir: Path, *, experts_device: str, dtype: str = "bfloat16", graphs: str = "off"
) -> list[Generated]:
    layout = first_layout(read_architecture(model_dir), lanes=2, tp=1)
    with LocalWorld(
        model_dir,
        layout,
        limits=Limits(step_tokens=32, max_running=8, max_waiting=16, chunk_tokens=16),
        page_tokens=16,
        num_pages=32,
        kernels="reference",
        dtype=dtype,
        experts_device=experts_device,  # type: ignore[arg-type]
        graphs=graphs,  # type: ignore[arg-type]
        capacity_factor=1.25,
    ) as world:
        return world.generate([[3], [5, 17, 99], list(range(3, 40))], SAMPLING)


def stored(rows: int, cols: int) -> StoredWeight:
    return StoredWeight(
        torch.randn(rows, cols).to(torch.float8_e4m3fn), torch.rand(rows // 32, cols // 32) * 0.02, 32
    )


def test_outputs_have_the_bits_of_the_cpus_kernels_and_all_else_of_the_others() -> None:
    cpu = native()
    composite = with_cpu_experts(KernelSet.reference(), "bfloat16")
    gate_up = [(stored(64, 96), stored(64, 96)) for _ in range(3)]
    down = [(stored(96, 64),) for _ in range(3)]
    x_ND, row_M = torch.randn(6, 96).bfloat16(), torch.tensor([4, 0, 1, 2, 4, 5, 0, 0])
    counts_e = torch.tensor([2, 0, 4])  # the last two pairs are nobody's

    def outputs(kernels: KernelSet) -> torch.Tensor:
        experts = Experts(kernels.prepare_grouped(gate_up, 128), kernels.prepare_grouped(down, 96))
        rows = kernels.wire_unpack(kernels.wire_pack(x_ND, 32), 96, 32)
        return kernels.experts(rows, row_M, counts_e, experts)[:6]

    assert torch.equal(outputs(composite), outputs(cpu))
    assert composite.linear_bf16 is KernelSet.reference().linear_bf16
    assert composite.fingerprint() != KernelSet.reference().fingerprint()
    assert "native" in composite.fingerprint()


@pytest.mark.parametrize("graphs", ["off", "twin"])
def test_a_world_with_its_experts_apart_gives_the_same_tokens(tiny_model_dir: Path, graphs: str) -> None:
    """In float32 the CPU's best is the reference: the same bits. In bfloat16 native kernels round elsewhere,
    and the self-test of each rank holds them to float64."""
    apart = run(tiny_model_dir, experts_device="cpu", dtype="float32", graphs=graphs)
    assert apart == run(tiny_model_dir, experts_device="auto", dtype="float32")


def test_native_experts_serve_beside_the_reference(tiny_model_dir: Path) -> None:
    native()
    found, wanted = (run(tiny_model_dir, experts_device=where) for where in ("cpu", "auto"))
    for one, other in zip(found, wanted, strict=True):
        assert one.logprobs[0].logprob == pytest.approx(other.logprobs[0].logprob, abs=0.2)


def test_weights_go_where_they_are_used() -> None:
    places = Places(torch.device("meta"), torch.device("cpu"))
    names = (
        "model.layers.3.mlp.experts.7.up_proj.weight",
        "model.layers.3.mlp.shared_experts.up_proj.weight",
    )
    expert, shared = places.put({name: torch.ones(2, 2) for name in names}).values()
    assert (expert.device.type, shared.device.type) == ("cpu", "meta")


def test_a_device_takes_triton_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` by the device of the weights."""
    asked: list[torch.dtype] = []
    monkeypatch.setattr(KernelSet, "triton", lambda dtype: asked.append(dtype) or KernelSet.reference(dtype))
    select_kernels("auto", "bfloat16", torch.device("cuda"))
    assert asked == [torch.bfloat16]
    with pytest.raises(ConfigError, match="for CPUs"):
        select_kernels("native", "bfloat16", torch.device("cuda"))
