"""One measurement as a line of JSON or of a table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from k2kernels.bench.ceilings import Ceilings


@dataclass(frozen=True, slots=True)
class Line:
    """One case by one contender. `share`: of the ceiling that binds; `note` says why there is no time."""

    op: str
    case: str
    contender: str
    time_us: float | None = None
    gb_s: float | None = None
    tflop_s: float | None = None
    share: float | None = None
    binds: str = ""
    note: str = ""


def machine(device: torch.device) -> dict[str, Any]:
    """Hardware, versions and date: without them a figure says nothing."""
    versions = {name: version(name) for name in ("torch", "triton") if find_spec(name)}
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else _processor(),
        "num_threads": torch.get_num_threads() if device.type == "cpu" else None,
        "versions": versions,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if "model name" in line] if info.exists() else []
    return names[0].split(":")[1].strip() if names else "CPU"


def head_line(kernels: str, ceilings: Ceilings, facts: dict[str, Any], *, is_json: bool) -> str:
    if is_json:
        return json.dumps({"kernels": kernels, "ceilings": asdict(ceilings), **facts})
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    return (
        f"{facts['device']}, {versions}, {facts['date']}; kernels: {kernels}\n"
        f"ceilings of this run: read {ceilings.read_gb_s:.1f} GB/s, copy {ceilings.copy_gb_s:.1f} GB/s, "
        f"bfloat16 products {ceilings.bfloat16_tflop_s:.2f} TFLOP/s\n" + _row(_HEADINGS)
    )


def line_text(line: Line, *, is_json: bool) -> str:
    if is_json:
        return json.dumps(asdict(line))
    if line.time_us is None:
        return _row((line.op, line.case, line.contender, line.note))
    assert line.gb_s is not None
    assert line.tflop_s is not None
    assert line.share is not None
    cells = (
        f"{line.time_us:.1f}",
        f"{line.gb_s:.2f}",
        f"{line.tflop_s:.3f}",
        f"{line.share:.0%} {line.binds}",
    )
    return _row((line.op, line.case, line.contender, *cells))


_HEADINGS = ("op", "case", "by", "us", "GB/s", "TFLOP/s", "of the ceiling")
_WIDTHS = (13, 35, 29, 10, 8, 8, 0)


def _row(cells: Sequence[str]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, _WIDTHS, strict=False)).rstrip()
