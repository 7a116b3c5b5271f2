"""What a run on one GPU is held to: issue 4's targets, and what its benches have to say to each. Pure.

A target is met, missed, or has no figure: then nothing was measured, and that is no success either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Line = dict[str, Any]  # of `k2kernels.bench --json` or `rehearsal.device_step`

OURS = "triton"
SCALED_MM = "torch._scaled_mm, blockwise"
STEP_LONGER_MOST = 0.05


@dataclass(frozen=True, slots=True)
class Verdict:
    """`measured`: as text; empty: there is no figure."""

    target: str
    wanted: str
    measured: str
    is_met: bool

    @property
    def word(self) -> str:
        if not self.measured:
            return "NO FIGURE"
        return "met" if self.is_met else "MISSED"


def judge(lines: Sequence[Line]) -> list[Verdict]:
    """Of all lines of a run together, in the order of the issue."""
    timed = [line for line in lines if line.get("share") is not None]
    return [
        _shares(
            "grouped expert GEMM, decode", "80% of reads", _timed(timed, "grouped_gemm", _is_decode), _80
        ),
        _shares("block-FP8 GEMM, 4,096 rows", "55% of 2 x bf16", _timed(timed, "fp8_gemm", _is_prefill), _55),
        _against(timed, "fp8_gemm", SCALED_MM, _is_prefill),
        _shares(
            "MLA decode, 64 rows, 4K and 32K keys",
            "75% of reads, or 60% of bf16",
            _timed(timed, "mla_decode", _is_served),
            lambda line: 0.75 if line["binds"] == "bytes" else 0.6,
        ),
        _step(line for line in lines if line.get("graphs")),
    ]


def failures(lines: Iterable[Line]) -> list[str]:
    """Ops and cases that failed."""
    return [
        f"{line['op']} {line['case']}: {line['note']}"
        for line in lines
        if line.get("contender") == OURS and str(line.get("note", "")).startswith("failed")
    ]


def table(verdicts: Sequence[Verdict]) -> str:
    rows = [("target", "wanted", "measured", "")]
    rows += [(one.target, one.wanted, one.measured or "-", one.word) for one in verdicts]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _timed(
    timed: Sequence[Line], op: str, is_asked: Callable[[dict[str, int]], bool], by: str = OURS
) -> list[Line]:
    return [
        line
        for line in timed
        if line["op"] == op and line["contender"] == by and is_asked(_sizes(line["case"]))
    ]


def _shares(target: str, wanted: str, found: Sequence[Line], least: Callable[[Line], float]) -> Verdict:
    """The case that is furthest below what it should be decides; all have to be met."""
    if not found:
        return Verdict(target, wanted, "", is_met=False)
    worst = min(found, key=lambda line: line["share"] / least(line))
    best = max(line["share"] for line in found)
    measured = f"{worst['share']:.0%} ({worst['case']}) to {best:.0%}, {len(found)} cases"
    return Verdict(target, wanted, measured, is_met=worst["share"] >= least(worst))


def _against(
    timed: Sequence[Line], op: str, peer: str, is_asked: Callable[[dict[str, int]], bool]
) -> Verdict:
    """Time of the peer by ours, case by case."""
    ours = {line["case"]: line["time_us"] for line in _timed(timed, op, is_asked)}
    theirs = {line["case"]: line["time_us"] for line in _timed(timed, op, is_asked, peer)}
    ratios = {case: theirs[case] / ours[case] for case in ours.keys() & theirs.keys()}
    if not ratios:
        return Verdict(f"{op} against {peer}", "ahead", "", is_met=False)
    worst = min(ratios, key=ratios.__getitem__)
    measured = f"{ratios[worst]:.2f} x ({worst}) to {max(ratios.values()):.2f} x"
    return Verdict(f"{op} against {peer}", "ahead", measured, is_met=ratios[worst] > 1.0)


def _step(steps: Iterable[Line]) -> Verdict:
    target, wanted = "decode step against its kernels", f"{STEP_LONGER_MOST:.0%} longer at most"
    for line in steps:
        if "longer" in line:
            how = f"{line['longer']:+.1%}: {line['step_ms']:.2f} ms a step, kernels {line['kernels_ms']:.2f}"
            measured = f"{how} ({line['layers']} layers, {line['decode']} rows)"
            return Verdict(target, wanted, measured, is_met=line["longer"] <= STEP_LONGER_MOST)
    return Verdict(target, wanted, "", is_met=False)


def _sizes(case: str) -> dict[str, int]:
    """Of a case as the bench writes it: `M=8 e=24 N=4096`."""
    return {name: int(value) for name, _, value in (part.partition("=") for part in case.split())}


def _is_decode(sizes: dict[str, int]) -> bool:
    """Up to 16 rows of each of the rank's experts."""
    return sizes["M"] <= 16 * sizes["e"]


def _is_prefill(sizes: dict[str, int]) -> bool:
    return sizes["T"] == 4096


def _is_served(sizes: dict[str, int]) -> bool:
    return sizes["R"] == 64 and 4096 <= sizes["num_keys"] <= 32768


def _80(_: Line) -> float:
    return 0.8


def _55(_: Line) -> float:
    return 0.55
