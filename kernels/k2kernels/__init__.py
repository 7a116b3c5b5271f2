"""The operations of one Kimi-K2 step, each with a contract, a reference and its cost (no k2dist)."""

from k2kernels.act_quant import QuantisedRows
from k2kernels.fp8_gemm import Linear, StoredWeight
from k2kernels.grouped_gemm import GroupedLinear
from k2kernels.kernel_set import Experts, KernelSet, Prepared
from k2kernels.router_topk import Rule

__all__ = [
    "Experts",
    "GroupedLinear",
    "KernelSet",
    "Linear",
    "Prepared",
    "QuantisedRows",
    "Rule",
    "StoredWeight",
]
