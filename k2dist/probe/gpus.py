"""GPUs as NVIDIA's driver reports them, by `nvidia-smi`, which comes with it: without CUDA or torch."""

from __future__ import annotations

import csv
import subprocess

from k2dist.doctor.facts import Gpu

COMMAND = "nvidia-smi"
_FIELDS = (
    "index",
    "name",
    "driver_version",
    "compute_cap",
    "memory.total",
    "memory.free",
    "mig.mode.current",
    "ecc.errors.uncorrected.volatile.total",
)
_ANSWER_S = 15.0  # with eight GPUs and no persistence daemon it wakes each of them
_MIB = 2**20


def find_gpus() -> tuple[tuple[Gpu, ...], str]:
    """The GPUs of this machine, or none and the reason."""
    command = [COMMAND, f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER_S, check=False)
    except FileNotFoundError:
        return (), f"no {COMMAND}: no driver of NVIDIA's is installed"
    except subprocess.TimeoutExpired:
        return (), f"{COMMAND} did not answer within {_ANSWER_S:g} s: the driver hangs"
    if answer.returncode != 0:
        words = (answer.stdout + answer.stderr).strip().splitlines()
        return (), f"{COMMAND}: {words[0] if words else f'exit code {answer.returncode}'}"
    return read_gpus(answer.stdout), ""


def read_gpus(table: str) -> tuple[Gpu, ...]:
    """Of what `nvidia-smi` prints, one line a GPU. Fields that a GPU does not have say [N/A]."""
    return tuple(_gpu([cell.strip() for cell in row]) for row in csv.reader(table.splitlines()) if row)


def _gpu(cells: list[str]) -> Gpu:
    index, name, driver, capability, total, free, mig, ecc = cells
    return Gpu(
        index=int(index),
        name=name,
        driver=driver,
        capability=capability,
        memory_bytes=int(total) * _MIB,
        free_bytes=int(free) * _MIB,
        is_split=mig == "Enabled",
        num_ecc_errors=int(ecc) if ecc.isdigit() else None,
    )
