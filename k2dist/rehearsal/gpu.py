"""All that one GPU has to show, within 9 minutes: `make gpu`, or `python -m k2dist.rehearsal.gpu`.

    compile    kernels of the bench's cases, an op to a process; what comes later finds them done
    tests      all tests marked gpu
    step       a decode step of a rank of K2, against the sum of its kernels
    bench      ops, in processes of their own: what one of them breaks on the device is gone with it

Each part has its time, and is ended when that is over; what it said until then counts. At the end one table:
the targets and what was measured, then what failed. The exit status is 0 only if nothing failed; a target
that is missed is a figure, not a failure. All that was said is kept under `--out`, to be carried home.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from k2dist.rehearsal.targets import Line, failures, judge, table

LIMIT_S = 530.0  # of all parts together; a minute of the rest is Python's and the table's


@dataclass(frozen=True, slots=True)
class Part:
    """`commands` run side by side, each with `limit_s`. `is_needed`: if it fails, the run has."""

    name: str
    limit_s: float
    commands: tuple[tuple[str, ...], ...]
    is_needed: bool = True


@dataclass(frozen=True, slots=True)
class Done:
    """What became of a part: `outcome` is ok, failed or out of time."""

    name: str
    outcome: str
    wall_s: float
    last_line: str
    lines: tuple[Line, ...]  # of JSON
    is_needed: bool


TARGET_OPS = ("grouped_gemm", "fp8_gemm", "mla_decode")
OTHER_OPS = (
    *("mla_prefill", "absorb", "linear_bf16", "router_logits", "router_topk", "act_quant", "swiglu"),
    *("swiglu_quant", "rmsnorm", "rope", "weighted_sum", "latent_write"),
)
_TESTS = ("tests/engine/test_gpu.py", "tests/comm/test_nccl.py", "tests/kernels")


def parts(capability: int) -> tuple[Part, ...]:
    """In the order in which they run. `capability`: of the device, as 90; together at most `LIMIT_S`."""
    ops = (*TARGET_OPS, *OTHER_OPS)
    return (
        Part(
            "compile",
            70,
            tuple(_python("k2kernels.bench.compile", op, "--for", str(capability)) for op in ops),
            is_needed=False,  # whoever launches a kernel compiles it
        ),
        Part("tests", 170, (_python("pytest", *_TESTS, "-m", "gpu", "-q", "--durations=10"),)),
        Part("step", 110, (_python("k2dist.rehearsal.device_step"),)),
        *(Part(f"bench {op}", 40, (_bench(35, op),)) for op in TARGET_OPS),
        Part("bench others", 60, (_bench(50, *OTHER_OPS),)),
    )


def run(part: Part, left_s: float, out_dir: Path) -> Done:
    """Its commands side by side, for as long as it has and as is left of all."""
    began_s = time.monotonic()
    limit_s = min(part.limit_s, max(left_s, 0.0))
    paths = [out_dir / f"{part.name.replace(' ', '-')}-{n}.log" for n in range(len(part.commands))]
    running = [_start(command, path) for command, path in zip(part.commands, paths, strict=True)]
    try:
        statuses = [_await(process, began_s + limit_s) for process in running]
    finally:  # Ctrl-C, too, ends what was started
        for process in running:
            _end(process)
    outcome = "out of time" if None in statuses else "failed" if any(statuses) else "ok"
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in paths]
    return Done(
        name=part.name,
        outcome=outcome,
        wall_s=time.monotonic() - began_s,
        last_line=_last_line(texts, statuses),
        lines=tuple(line for text in texts for line in json_lines(text)),
        is_needed=part.is_needed,
    )


def report(done: Sequence[Done]) -> tuple[str, bool]:
    """The table of parts, of targets, and of what failed; whether nothing has."""
    lines = [line for one in done for line in one.lines]
    failed = failures(lines)
    broken = [one for one in done if one.is_needed and one.outcome != "ok"]
    shown = [f"{one.name:18}  {one.outcome:11}  {one.wall_s:5.0f} s  {one.last_line}" for one in done]
    text = "\n".join((*shown, "", table(judge(lines)), *(["", "failed:", *failed] if failed else [])))
    return text, not failed and not broken


def json_lines(text: str) -> list[Line]:
    """Those that are whole; a process that was ended may have left half of one."""
    found = []
    for line in text.splitlines():
        if line.startswith("{") and line.endswith("}"):
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return found


def main(arguments: list[str]) -> int:
    import torch

    parser = argparse.ArgumentParser(prog="python -m k2dist.rehearsal.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("gpu-run"), help="where all that was said is kept")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise SystemExit("make gpu: torch finds no CUDA device here")
    major, minor = torch.cuda.get_device_capability()
    options.out.mkdir(parents=True, exist_ok=True)
    end_s, done = time.monotonic() + LIMIT_S, []
    for part in parts(10 * major + minor):
        done.append(run(part, end_s - time.monotonic(), options.out))
        print(f"{part.name}: {done[-1].outcome}, {done[-1].wall_s:.0f} s", flush=True)
    text, is_good = report(done)
    (options.out / "table.txt").write_text(text + "\n", encoding="utf-8")
    print(f"\n{torch.cuda.get_device_name()}\n{text}", flush=True)
    return 0 if is_good else 1


def _python(module: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", module, *arguments)


def _bench(seconds: int, *ops: str) -> tuple[str, ...]:
    return _python("k2kernels.bench", *ops, "--json", "--seconds", str(seconds))


def _start(command: Sequence[str], path: Path) -> subprocess.Popen[bytes]:
    """In a session of its own, so that what it starts can be ended with it."""
    with path.open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def _await(process: subprocess.Popen[bytes], give_up_s: float) -> int | None:
    """Its exit status; None: it was ended, for its time was over."""
    try:
        return process.wait(max(give_up_s - time.monotonic(), 0.0))
    except subprocess.TimeoutExpired:
        _end(process)
        return None


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _last_line(texts: Sequence[str], statuses: Sequence[int | None]) -> str:
    """Of the first command that did not do well, or of the first; no JSON."""
    text = next((text for text, status in zip(texts, statuses, strict=True) if status != 0), texts[0])
    words = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("{")]
    return words[-1][:100] if words else ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
