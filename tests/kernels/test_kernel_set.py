"""The table of kernels: its two precisions, swapping one, and every op's cases and cost."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable

import k2kernels
import pytest
import torch
from k2kernels import Experts, KernelSet, QuantisedRows, StoredWeight, act_quant
from torch import Tensor

SERVED, EXACT = KernelSet.reference(), KernelSet.reference(torch.float32)
OPS = [
    module
    for info in pkgutil.iter_modules(k2kernels.__path__)
    if hasattr(module := importlib.import_module(f"k2kernels.{info.name}"), "CASES")
]


def stored(rows: int, cols: int) -> StoredWeight:
    w_NK = (torch.randn(rows, cols) * 50).clamp(-448, 448).to(torch.float8_e4m3fn)
    return StoredWeight(w_NK, torch.rand(-(-rows // 32), -(-cols // 32)) / 100, 32)


def test_bfloat16_quantises_activations_and_float32_nothing() -> None:
    linear, x_TK = SERVED.prepare_linear([stored(64, 96)]), torch.randn(5, 96).bfloat16()
    quantised = act_quant.reference(x_TK, 32).float()
    assert torch.equal(SERVED.linear(x_TK, linear), (quantised @ linear.w_NK.T).bfloat16())
    exact = EXACT.linear(x_TK.float(), linear)
    assert torch.allclose(exact, x_TK.float() @ linear.w_NK.T, rtol=1e-5, atol=1e-4)
    assert not torch.equal(exact.bfloat16(), SERVED.linear(x_TK, linear))


def test_weights_without_scales_leave_activations_alone() -> None:
    weight = StoredWeight(torch.randn(64, 96).bfloat16())
    linear, x_TK = SERVED.prepare_linear([weight]), torch.randn(5, 96).bfloat16()
    assert torch.equal(SERVED.linear(x_TK, linear, torch.float32), x_TK.float() @ weight.w_NK.float().T)


def test_the_wire_is_quantised_where_experts_are() -> None:
    x_TD = torch.randn(5, 96).bfloat16()
    assert isinstance(SERVED.wire_unpack(SERVED.wire_pack(x_TD, 32), 96, 32), QuantisedRows)
    assert torch.equal(SERVED.wire_pack(x_TD, None), x_TD)
    assert torch.equal(EXACT.wire_pack(x_TD.float(), 32), x_TD.float())


@pytest.mark.parametrize("kernels", [SERVED, EXACT], ids=["bfloat16", "float32"])
def test_an_experts_output_is_that_of_a_plain_mlp(kernels: KernelSet) -> None:
    """The same bits: an expert that ran on another rank, among other experts, changes nothing."""
    parts = [(stored(64, 96), stored(64, 96), stored(96, 64)) for _ in range(3)]
    experts = Experts(
        gate_up=kernels.prepare_grouped([(gate, up) for gate, up, _ in parts], 128),
        down=kernels.prepare_grouped([(down,) for _, _, down in parts], 96),
    )
    x_ND = torch.randn(6, 96).to(kernels.dtype)
    row_M, slot_M = torch.tensor([4, 0, 1, 2, 4, 5, 5]), torch.tensor([0, 0, 1, 1, 1, 1, 2])
    rows = kernels.wire_unpack(kernels.wire_pack(x_ND, 32), 96, 32)
    out_MD = kernels.experts(rows, row_M, slot_M.bincount(), experts)
    assert out_MD.dtype == kernels.return_dtype
    for row, slot, out_D in zip(row_M, slot_M, out_MD, strict=True):
        gate, up, down = parts[slot]
        alone = kernels.mlp(
            x_ND[row][None], kernels.prepare_linear([gate, up]), kernels.prepare_linear([down])
        )
        assert torch.equal(out_D, alone[0])


def test_one_kernel_can_be_swapped() -> None:
    calls: list[tuple[int, ...]] = []

    def counting(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        calls.append(tuple(x_TD.shape))
        return SERVED.rmsnorm(x_TD, weight_D, eps)

    swapped = dataclasses.replace(SERVED, name="counting", rmsnorm=counting)
    swapped.rmsnorm(torch.randn(2, 4), torch.ones(4), 1e-6)
    assert calls == [(2, 4)]
    assert swapped.mla_decode is SERVED.mla_decode


def test_fingerprints_tell_sets_and_precisions_apart() -> None:
    assert SERVED.fingerprint() == KernelSet.reference().fingerprint()
    assert torch.__version__ in SERVED.fingerprint()
    other = dataclasses.replace(SERVED, name="other")
    assert len({SERVED.fingerprint(), EXACT.fingerprint(), other.fingerprint()}) == 3


def test_a_fingerprint_tells_the_number_of_threads(with_threads: Callable[[int], None]) -> None:
    """Of the reference, whose products are a library's: it may share a sum among its threads."""
    alone = KernelSet.reference().fingerprint()
    with_threads(2)
    assert KernelSet.reference().fingerprint() != alone


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_every_op_has_cases_and_a_cost(op: object) -> None:
    costs = [(case, op.cost(case)) for case in op.CASES]  # type: ignore[attr-defined]
    assert any(cost.num_bytes > 0 for _, cost in costs)
    for case, cost in costs:
        rows = next(iter(dataclasses.asdict(case).values()))
        assert cost.num_flops >= 0, case
        assert rows > 0 or cost.num_flops == 0, f"{case}: work without rows"


def test_no_op_is_without_its_twin() -> None:
    assert {op.__name__.split(".")[1] for op in OPS} >= {
        "act_quant",
        "fp8_gemm",
        "grouped_gemm",
        "linear_bf16",
        "router_logits",
        "router_topk",
        "absorb",
        "mla_decode",
        "mla_prefill",
        "latent_write",
        "rmsnorm",
        "rope",
        "swiglu",
        "weighted_sum",
    }
    assert all(hasattr(op, "reference") or hasattr(op, "reference_") for op in OPS)
