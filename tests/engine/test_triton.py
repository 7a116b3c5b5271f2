"""The engine with Triton's kernels, interpreted: in a process of its own, since the interpreter is chosen
before Triton is imported. Run as a script: MODEL_DIR KERNELS.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

DEMO = Path(__file__).parents[2] / "k2dist" / "demo" / "model"


def main(model_dir: str, kernels: str) -> None:
    """One JSON line: tokens, logprobs, steps that were replayed."""
    import torch

    from k2dist.engine import LocalWorld, runtime
    from k2dist.engine.selftest import SelfTestReport
    from k2dist.messages import Sampling
    from k2dist.scheduler import Limits

    torch.set_num_threads(1)
    nothing = SelfTestReport(num_tensors=0, num_bytes=0, has_manifest=False, worst_error=0.0, test_s=0.0)
    runtime.self_test = lambda *args, **kwargs: nothing  # two minutes of interpreting; a test of its own
    runtime.warm_up = lambda *args, **kwargs: None  # nothing is compiled
    limits = Limits(step_tokens=16, max_running=2, max_waiting=4, chunk_tokens=16)
    with LocalWorld(
        Path(model_dir), limits=limits, num_pages=2, kernels=kernels, dtype="float32", graphs="twin"
    ) as world:
        sampling = Sampling(temperature=0.0, max_tokens=3, ignore_eos=True, logprobs=2)
        (output,) = world.generate([[75, 300, 82]], sampling)
        stats = world.ranks[0].stats()
    logprobs = [logprob.logprob for logprob in output.logprobs]
    print(json.dumps([output.token_ids, logprobs, stats.num_steps_replayed]))


def run(kernels: str) -> tuple[list[int], list[float], int]:
    output = subprocess.run(
        [sys.executable, __file__, str(DEMO), kernels],
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ
        | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    ).stdout
    tokens, logprobs, num_replayed = json.loads(output)
    return tokens, logprobs, num_replayed


@pytest.mark.slow  # half a minute of interpreting
@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_a_prompt_and_replayed_steps_give_the_references_tokens() -> None:
    tokens, logprobs, num_replayed = run("triton")
    wanted, wanted_logprobs, _ = run("reference")
    assert tokens == wanted
    assert logprobs == pytest.approx(wanted_logprobs, abs=1e-4)
    assert num_replayed == 2


if __name__ == "__main__":
    main(*sys.argv[1:])
