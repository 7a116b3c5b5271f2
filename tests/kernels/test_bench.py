"""The kernel bench: every op can be timed, peers compute the same, and what it prints can be read back."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from k2kernels import KernelSet
from k2kernels.bench import __main__ as bench
from k2kernels.bench.ceilings import Ceilings
from k2kernels.bench.peers import peers_of
from k2kernels.bench.work import OPS, Work
from k2kernels.cost import Cost
from torch import Tensor

CPU = torch.device("cpu")
# A case of each op that a laptop computes in a millisecond.
SMALL = {
    "fp8_gemm": {"T": 3, "N": 192, "K": 256},
    "grouped_gemm": {"M": 5, "e": 3, "N": 128, "K": 256},
    "mla_decode": {"R": 2, "num_keys": 70, "H": 2},
    "mla_prefill": {"T": 5, "start": 0, "H": 2},
    "absorb": {"T": 3, "H": 2, "K": 16, "N": 24},
    "linear_bf16": {"T": 3, "N": 40, "K": 64},
    "router_logits": {"T": 3, "E": 12, "D": 64},
    "router_topk": {"T": 3, "E": 12, "K": 2},
    "act_quant": {"T": 3, "K": 256},
    "swiglu": {"T": 3, "F": 128},
    "swiglu_quant": {"T": 3, "F": 128},
    "rmsnorm": {"T": 3, "D": 64},
    "rope": {"T": 3, "H": 2},
    "weighted_sum": {"T": 3, "K": 2, "D": 64},
    "latent_write": {"T": 3},
}
SAME = {"fp8_gemm": 0.05, "mla_decode": 0.02, "linear_bf16": 0.02, "router_logits": 1e-4, "rmsnorm": 0.02}


def test_every_op_with_cases_can_be_timed() -> None:
    assert set(OPS) == set(SMALL)
    table = {name for name in KernelSet.__dataclass_fields__ if name.rstrip("_") in OPS}
    assert {name.rstrip("_") for name in table} == set(OPS)


@pytest.mark.parametrize("name", OPS)
def test_an_ops_work_runs_and_its_peers_on_this_machine_compute_the_same(name: str) -> None:
    op = OPS[name]
    work = op.build(op.module.Case(**SMALL[name]), KernelSet.reference(), CPU)
    result = work.run()
    for peer in peers_of(name, CPU):
        assert peer.is_installed
        call = peer.prepare(work)
        assert call is not None
        other = call()
        if name in SAME:
            assert isinstance(result, Tensor)
            assert isinstance(other, Tensor)
            other = other.reshape(result.shape).float()
            assert (result.float() - other).norm() <= SAME[name] * result.float().norm(), peer.name


def test_shares_are_of_what_binds() -> None:
    ceilings = Ceilings(read_gb_s=100.0, copy_gb_s=80.0, bfloat16_tflop_s=1.0, e4m3_factor=2.0)
    assert ceilings.floor_s(Cost(10**9, 10**9), is_e4m3=False) == (pytest.approx(0.01), "bytes")
    assert ceilings.floor_s(Cost(10**3, 10**12), is_e4m3=True) == (pytest.approx(0.5), "flops")


def test_lines_can_be_read_back(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ceilings = Ceilings(read_gb_s=10.0, copy_gb_s=8.0, bfloat16_tflop_s=0.1, e4m3_factor=1.0)
    monkeypatch.setattr(bench, "measure_ceilings", lambda clock: ceilings)
    bench.main(["rope", "--json", "--kernels", "reference", "--seconds", "0"])
    first, *lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert first["kernels"] == "reference"
    assert first["ceilings"]["read_gb_s"] == 10.0
    assert {"device", "versions", "date"} <= set(first)
    assert {line["op"] for line in lines} == {"rope"}
    assert all(line["time_us"] is None and "used up" in line["note"] for line in lines)


def test_a_kernel_that_fails_is_a_row_and_the_exit_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the next op is timed."""
    ceilings = Ceilings(read_gb_s=10.0, copy_gb_s=8.0, bfloat16_tflop_s=0.1, e4m3_factor=1.0)
    monkeypatch.setattr(bench, "measure_ceilings", lambda clock: ceilings)
    broken = dataclasses.replace(OPS["rope"], build=lambda *_: Work(lambda: 1 // 0))
    for name, op in (("rope", broken), ("swiglu", OPS["swiglu"])):
        case = op.module.Case(**SMALL[name])
        monkeypatch.setattr(op.module, "CASES", [case])
        monkeypatch.setitem(bench.OPS, name, op)
    assert bench.main(["rope", "swiglu", "--json", "--kernels", "reference"]) == 1
    _, rope, *others = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert (rope["op"], rope["time_us"]) == ("rope", None)
    assert rope["note"].startswith("failed: ZeroDivisionError")
    assert all(line["time_us"] for line in others if line["contender"] == "reference")
    assert bench.main(["swiglu", "--json", "--kernels", "reference"]) == 0


def test_what_cannot_be_timed_is_refused() -> None:
    with pytest.raises(SystemExit, match="no such set"):
        bench.kernel_set("quick", CPU)
    with pytest.raises(SystemExit, match="needs a CUDA device"):
        bench.kernel_set("triton", CPU)
