"""Which kernels a rank uses: the names a config may give, and what `auto` means on this machine.

auto        native where its library is there and the stream is bfloat16, else reference (with a warning)
native      C++ for the CPU: bfloat16 only
reference   plain torch: any dtype, slow
"""

import logging
from dataclasses import replace

import torch
from k2kernels import Experts, KernelSet, Prepared, QuantisedRows
from k2kernels.native import NoNativeKernelsError
from torch import Tensor

from k2dist.errors import ConfigError
from k2dist.observe.event_log import EventLog

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_LOG = EventLog(logging.getLogger(__name__))


CPU = torch.device("cpu")


def select_kernels(name: str, dtype: str, device: torch.device = CPU) -> KernelSet:
    """The kernel set called `name`, for a residual stream of `dtype` and weights on `device`."""
    if dtype not in _DTYPES:
        raise ConfigError(f"dtype={dtype!r}: use one of {', '.join(_DTYPES)}")
    match name:
        case "reference":
            return KernelSet.reference(_DTYPES[dtype])
        case "native" if device.type != "cpu":
            raise ConfigError(f"kernels='native': for CPUs; on {device.type} use 'auto' or 'triton'")
        case "native":
            return _native(dtype)
        case "triton":
            return KernelSet.triton(_DTYPES[dtype])
        case "auto":
            return KernelSet.triton(_DTYPES[dtype]) if device.type == "cuda" else _best(dtype)
    raise ConfigError(f"kernels={name!r}: use 'auto', 'native', 'triton' or 'reference'")


def with_cpu_experts(kernels: KernelSet, dtype: str) -> KernelSet:
    """`kernels`, and for the experts the best set of the CPU, where their weights are.

    Rows and outputs travel between; the host waits for both. Rows are quantised before, as they always are.
    """
    cpu = _best(dtype)
    assert cpu.return_dtype == kernels.return_dtype, "outputs go home in one dtype"

    def experts(
        x: Tensor | QuantisedRows,
        row_M: Tensor,
        counts_e: Tensor,
        gate_up: Prepared,
        down: Prepared,
        out_dtype: torch.dtype,
    ) -> Tensor:
        assert out_dtype == cpu.return_dtype
        out_MD = cpu.experts(_on_cpu(x), row_M.cpu(), counts_e.cpu(), Experts(gate_up, down))
        return out_MD.to(row_M.device)

    return replace(
        kernels,
        name=f"{kernels.name}, experts {cpu.name}",
        versions=(*kernels.versions, *cpu.versions),
        prepare_grouped=cpu.prepare_grouped,
        holds_grouped=cpu.holds_grouped,
        whole_experts=experts,
        whole_moe=None,  # these would look into what the CPU's set has laid out
        whole_layers=None,
    )


def _on_cpu(x: Tensor | QuantisedRows) -> Tensor | QuantisedRows:
    if isinstance(x, Tensor):
        return x.cpu()
    return QuantisedRows(x.q_TK.cpu(), x.scale_Tk.cpu(), x.block)


def _native(dtype: str) -> KernelSet:
    if dtype != "bfloat16":
        raise ConfigError(f"kernels='native', dtype={dtype!r}: native kernels compute in bfloat16 only")
    try:
        return KernelSet.native()
    except NoNativeKernelsError as error:
        raise ConfigError(f"kernels='native': {error}") from error


def _best(dtype: str) -> KernelSet:
    if dtype == "bfloat16":
        try:
            return KernelSet.native()
        except NoNativeKernelsError as error:
            _LOG.warning("kernels.slow_path", reason=str(error))
    return KernelSet.reference(_DTYPES[dtype])
