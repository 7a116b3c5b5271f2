"""A run on one GPU tells of everything, whatever fails in it: played with commands that any machine has."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from k2dist.rehearsal import gpu
from k2dist.rehearsal.gpu import Done, Part, report, run
from k2dist.rehearsal.targets import OURS, SCALED_MM, Line, judge, table

GROUPED = [f"M={m} e=24 N=4096 K=7168" for m in (8, 24, 384)]
MLA = [f"R=64 num_keys={n} H=64 L=512 D=576" for n in (4096, 32768)]


def timed(op: str, case: str, share: float, binds: str = "bytes", by: str = OURS, us: float = 10.0) -> Line:
    return {
        "op": op,
        "case": case,
        "contender": by,
        "time_us": us,
        "share": share,
        "binds": binds,
        "note": "",
    }


def good() -> list[Line]:
    gemm = "T=4096 N=4096 K=7168"
    return [
        *(timed("grouped_gemm", case, 0.81) for case in GROUPED),
        timed("grouped_gemm", "M=8192 e=24 N=4096 K=7168", 0.3, "flops"),  # not of decode
        timed("fp8_gemm", gemm, 0.56, "flops"),
        timed("fp8_gemm", gemm, 0.5, by=SCALED_MM, us=12.0),
        timed("fp8_gemm", "T=1 N=4096 K=7168", 0.2),  # nor this of prefill
        timed("mla_decode", MLA[0], 0.61, "flops"),
        timed("mla_decode", MLA[1], 0.76),
        timed("mla_decode", "R=1 num_keys=4096 H=64 L=512 D=576", 0.1),
        {"graphs": False, "longer": 0.9, "step_ms": 2.0, "kernels_ms": 1.0, "layers": 61, "decode": 64},
        {"graphs": True, "longer": 0.04, "step_ms": 1.04, "kernels_ms": 1.0, "layers": 61, "decode": 64},
    ]


def words(lines: list[Line]) -> list[str]:
    return [verdict.word for verdict in judge(lines)]


def test_all_that_the_issue_asks_for_is_met() -> None:
    assert words(good()) == ["met"] * 5


@pytest.mark.parametrize(
    ("place", "key", "value", "missed"),
    [
        (1, "share", 0.79, 0),
        (4, "share", 0.54, 1),
        (4, "time_us", 12.5, 2),
        (7, "share", 0.59, 3),
        (8, "share", 0.74, 3),
        (11, "longer", 0.06, 4),
    ],
)
def test_one_case_below_a_target_misses_it(place: int, key: str, value: float, missed: int) -> None:
    lines = good()
    lines[place] = lines[place] | {key: value}
    assert words(lines) == ["MISSED" if number == missed else "met" for number in range(5)]


def test_what_was_not_measured_is_no_success() -> None:
    assert words([]) == ["NO FIGURE"] * 5
    assert "NO FIGURE" in table(judge(good()[3:]))


def command(text: str) -> tuple[str, ...]:
    return (sys.executable, "-c", text)


def test_a_part_that_fails_or_takes_too_long_keeps_what_it_has_said(tmp_path: Path) -> None:
    line = json.dumps(timed("rope", "T=3", 0.5))
    broken = run(Part("one", 20, (command(f"print({line!r}); raise SystemExit('no room')"),)), 99, tmp_path)
    assert (broken.outcome, broken.last_line, len(broken.lines)) == ("failed", "no room", 1)
    began_s = time.monotonic()
    stuck = Part(
        "two", 3, (command(f"import time; print({line!r}, flush=True); time.sleep(60)"), command(""))
    )
    late = run(stuck, 99, tmp_path)
    assert (late.outcome, len(late.lines)) == ("out of time", 1)
    assert time.monotonic() - began_s < 30
    assert run(stuck, 0.0, tmp_path).outcome == "out of time", "nothing is left of the time of all"
    assert run(Part("three", 20, (command("print('2 passed')"),)), 99, tmp_path).last_line == "2 passed"


def test_the_report_says_what_failed_and_the_status_with_it() -> None:
    def done(outcome: str, lines: list[Line], *, is_needed: bool = True) -> Done:
        return Done("bench", outcome, 9.0, "", tuple(lines), is_needed)

    assert report([done("ok", good())])[1]
    slow = [line | {"share": 0.1} if "share" in line else line for line in good()]
    assert report([done("ok", slow)])[1], "a target that is missed is a figure"
    assert not report([done("failed", good())])[1]
    assert report([done("failed", good(), is_needed=False)])[1]
    bad = {"op": "rope", "case": "T=3", "contender": OURS, "share": None, "note": "failed: OutOfResources: x"}
    text, is_good = report([done("ok", [*good(), bad])])
    assert not is_good
    assert "rope T=3: failed: OutOfResources" in text


def test_the_parts_fit_their_time_and_bench_every_op() -> None:
    from k2kernels.bench.work import OPS

    found = gpu.parts(90)
    assert sum(part.limit_s for part in found) <= gpu.LIMIT_S
    assert {*gpu.TARGET_OPS, *gpu.OTHER_OPS} == set(OPS)
    assert len(gpu.TARGET_OPS) + len(gpu.OTHER_OPS) == len(OPS)


def test_half_a_line_is_left_out() -> None:
    assert gpu.json_lines('{"a": 1}\nnoise\n{"b": 2\n{"c" 3}\n') == [{"a": 1}]
