"""`python -m k2kernels.bench [OP ...]`: a table of times, or `--json` lines to keep in kernels/results/."""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from k2kernels import KernelSet
from k2kernels.bench.ceilings import Ceilings, measure_ceilings
from k2kernels.bench.peers import REFUSALS, Peer, peers_of
from k2kernels.bench.report import Line, head_line, line_text, machine
from k2kernels.bench.timing import Clock
from k2kernels.bench.work import OPS, Op, Work
from k2kernels.cost import Cost

# Larger cases are left out. On a CPU the reference is far above the floor, and dequantised weights take four
# times their bytes.
MOST_BYTES = {"cuda": 64 << 30, "cpu": 64 << 20}
MOST_FLOPS = {"cuda": 10**13, "cpu": 2 * 10**9}
FAILED = "failed"  # what the note of a kernel begins with that did not get through its case


@dataclass(frozen=True, slots=True)
class Bench:
    """One kernel set on one device. `end_s`: no case begins after it, on the clock of `time.monotonic`."""

    kernels: KernelSet
    device: torch.device
    clock: Clock
    ceilings: Ceilings
    end_s: float

    def lines(self, name: str) -> Iterator[Line]:
        """Every case of op `name` that has rows: first our kernel, then its peers."""
        op = OPS[name]
        for case in op.module.CASES:
            cost: Cost = op.module.cost(case)
            if cost.num_bytes == 0 or next(iter(asdict(case).values())) == 0:
                continue
            text = " ".join(f"{key}={value}" for key, value in asdict(case).items())
            if reason := self._reason_to_skip(cost):
                yield Line(name, text, self.kernels.name, note=reason)
                continue
            line = Line(name, text, self.kernels.name)
            try:
                work = op.build(case, self.kernels, self.device)
                yield self._timed(line, op, cost, self.clock.median_s(work.run))
            except Exception as error:  # noqa: BLE001  whatever a kernel raises is its own row's
                traceback.print_exc()
                yield Line(name, text, self.kernels.name, note=f"{FAILED}: {_first_line(error)}")
                continue
            for peer in peers_of(name, self.device):
                yield self._peer_line(Line(name, text, peer.name), peer, op, cost, work)

    def _reason_to_skip(self, cost: Cost) -> str:
        if time.monotonic() > self.end_s:
            return "left out: the time for this run is used up"
        kind = self.device.type
        if cost.num_flops > MOST_FLOPS[kind] or cost.num_bytes > MOST_BYTES[kind]:
            return f"left out: too large for a {kind} run"
        return ""

    def _peer_line(self, line: Line, peer: Peer, op: Op, cost: Cost, work: Work) -> Line:
        if not peer.is_installed:
            return Line(line.op, line.case, peer.name, note="not installed")
        try:
            call = peer.prepare(work)
            if call is None:
                return Line(line.op, line.case, peer.name, note="not for this case")
            return self._timed(line, op, cost, self.clock.median_s(call))
        except REFUSALS as error:
            return Line(line.op, line.case, peer.name, note=f"refused: {_first_line(error)}")

    def _timed(self, line: Line, op: Op, cost: Cost, time_s: float) -> Line:
        floor_s, binds = self.ceilings.floor_s(cost, is_e4m3=op.is_e4m3)
        return Line(
            line.op,
            line.case,
            line.contender,
            time_us=time_s * 1e6,
            gb_s=cost.num_bytes / time_s / 1e9,
            tflop_s=cost.num_flops / time_s / 1e12,
            share=floor_s / time_s,
            binds=binds,
        )


def _first_line(error: Exception) -> str:
    text, _, _ = str(error).strip().partition("\n")
    return f"{type(error).__name__}: {text[:80]}"


def kernel_set(name: str | None, device: torch.device) -> KernelSet:
    """The set called `name`; without a name Triton's on a CUDA device and the reference elsewhere."""
    name = name or ("triton" if device.type == "cuda" else "reference")
    make: Any = getattr(KernelSet, name, None)
    if make is None:
        raise SystemExit(f"--kernels {name}: this k2kernels has no such set")
    if name == "triton" and device.type != "cuda":
        raise SystemExit("--kernels triton: needs a CUDA device; interpreted kernels tell nothing about time")
    kernels: KernelSet = make()
    return kernels


def main(arguments: list[str]) -> int:
    """The exit status: 1 if any of our kernels failed. Peers may refuse."""
    parser = argparse.ArgumentParser(prog="python -m k2kernels.bench", description=__doc__)
    parser.add_argument("op", nargs="*", help=f"which ops; all without a name: {', '.join(OPS)}")
    parser.add_argument("--kernels", choices=("reference", "native", "triton"))
    parser.add_argument("--json", action="store_true", help="JSON lines, the first with machine and ceilings")
    parser.add_argument("--seconds", type=float, default=240.0, help="begin no case after this many")
    options = parser.parse_args(arguments)
    if unknown := sorted(set(options.op) - set(OPS)):
        parser.error(f"{', '.join(unknown)}: no such op")
    end_s = time.monotonic() + options.seconds
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    with torch.inference_mode():
        kernels = kernel_set(options.kernels, device)
        clock = Clock(device, case_s=0.05 if device.type == "cuda" else 0.2)
        ceilings = measure_ceilings(clock)
        print(head_line(kernels.name, ceilings, machine(device), is_json=options.json), flush=True)
        bench = Bench(kernels, device, clock, ceilings, end_s)
        has_failed = False
        for name in options.op or OPS:
            for line in bench.lines(name):
                has_failed |= line.note.startswith(FAILED)
                print(line_text(line, is_json=options.json), flush=True)
    return int(has_failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
