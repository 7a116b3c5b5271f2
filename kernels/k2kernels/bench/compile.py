"""Compiles every kernel for a GPU that is not there: `python -m k2kernels.bench.compile [OP ...] --for 90`.

Ops are launched with K2's cases on tensors without memory; Triton compiles what it would compile there, and
the disassembler that it brings tells registers, spills, shared memory and which matrix instructions it chose.
What this cannot tell is time and results. Triton keeps what it compiled, so a machine with the device and the
same versions finds it done if the cache travels with the code.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from k2kernels import KernelSet, arguments, jit
from k2kernels.bench.work import OPS

META = torch.device("meta")
_PRODUCTS = re.compile(r"\b((?:HGMMA|QGMMA|HMMA|QMMA|UTCHMMA|UTCQMMA)[.\w]*)")


@dataclass(frozen=True, slots=True)
class Compiled:
    """One kernel for one set of constants and argument properties. `spilled_bytes`: of a thread's stack."""

    op: str
    kernel: str
    constants: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    products: dict[str, int]  # instructions of the tensor core in the code, by name


class _Absent:
    """What Triton asks a driver for when it compiles and does not launch."""

    def __init__(self, capability: int) -> None:
        self._target = import_module("triton.backends.compiler").GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> object:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_all(names: list[str], capability: int) -> Iterator[Compiled]:
    """Each kernel that the cases of these ops launch, once for everything that it is specialised by."""
    import_module("triton").runtime.driver.set_active(_Absent(capability))
    arguments.capability = lambda device: divmod(capability, 10)  # launchers choose tiles by it
    seen = set()
    for name, kernel, args, options in _launches(names):
        compiled = kernel.jitted().warmup(*args, grid=(1,), **options)
        if compiled.hash not in seen:
            seen.add(compiled.hash)
            yield _described(name, kernel, options, compiled)


def _launches(names: list[str]) -> list[tuple[str, jit.Kernel, tuple[Any, ...], dict[str, Any]]]:
    """What the cases of these ops would launch. Nothing is compiled yet: launches would go past `Kernel`."""
    launches = []

    def note(kernel: jit.Kernel, grid: tuple[int, ...]) -> Any:
        return lambda *args, **options: launches.append((name, kernel, args, options))

    launch, jit.Kernel.__getitem__ = jit.Kernel.__getitem__, note  # type: ignore[method-assign]
    for name in names:
        op = OPS[name]
        for case in op.module.CASES:
            if next(iter(asdict(case).values())):
                op.build(case, KernelSet.triton(), META).run()
    jit.Kernel.__getitem__ = launch  # type: ignore[method-assign]
    return launches


def _described(op: str, kernel: jit.Kernel, options: dict[str, Any], compiled: Any) -> Compiled:
    triton_dir = Path(str(import_module("triton").__file__)).parent
    disassembler = str(triton_dir / "backends" / "nvidia" / "bin" / "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage, code = (
            subprocess.run(
                [disassembler, what, cubin.name], capture_output=True, text=True, check=True
            ).stdout
            for what in ("-res-usage", "-sass")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, f"no register count in: {usage}"
    constants = " ".join(f"{name}={value}" for name, value in options.items() if name != "enable_fp_fusion")
    return Compiled(
        op=op,
        kernel=kernel.function.__name__,
        constants=constants,
        registers=int(found[1]),
        spilled_bytes=int(found[2]),
        shared_bytes=int(compiled.metadata.shared),
        products=dict(Counter(_PRODUCTS.findall(code))),
    )


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m k2kernels.bench.compile", description=__doc__)
    parser.add_argument("op", nargs="*", help="which ops; all without a name")
    parser.add_argument("--for", dest="capability", type=int, default=90, help="compute capability, as 90")
    options = parser.parse_args(arguments)
    for compiled in compile_all(options.op or list(OPS), options.capability):
        print(json.dumps(asdict(compiled)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
