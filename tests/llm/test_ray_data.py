"""The Ray Data example answers a file of prompts, on a small Ray of its own."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy
import psutil

from k2dist.llm import SamplingParams

EXAMPLE = Path(__file__).resolve().parents[2] / "deploy" / "ray_data.py"
# A Ray as small as it gets; the example's own `ray.data` calls then find it.
SMALL_RAY = """
import runpy, sys
import ray

ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=80 * 2**20, log_to_driver=False)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_the_example_answers_prompts_in_order(tiny_model_dir: Path, tmp_path: Path) -> None:
    rows = [{"prompt": text, "key": i} for i, text in enumerate(["abc", "x", "", *["abc"] * 7])]
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "answers"
    prompts.write_text("\n".join(map(json.dumps, rows)))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"HOME": str(tmp_path), "RAY_USAGE_STATS_ENABLED": "0"}
    options = ["--model", tiny_model_dir, "--prompts", prompts, "--out", out, "--batch-size", "4"]
    run = subprocess.Popen(
        [sys.executable, "-c", SMALL_RAY, str(EXAMPLE), *map(str, options), "--max-tokens", "3"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )
    try:
        said, _ = run.communicate(timeout=120)
    finally:
        left = psutil.Process(run.pid).children(recursive=True) if run.poll() is None else []
        for process in [*left, run]:
            process.kill()
        run.wait()
    assert run.returncode == 0, said
    answers = [json.loads(line) for path in sorted(out.iterdir()) for line in path.read_text().splitlines()]
    assert [{"prompt": answer["prompt"], "key": answer["key"]} for answer in answers] == rows
    assert answers[2]["finish_reason"] == "error"
    assert answers[2]["error"].startswith("prompt: empty")
    good = [answer for answer in answers if answer["key"] != 2]
    assert all(answer["finish_reason"] in ("length", "stop") and not answer["error"] for answer in good)
    assert len({answer["text"] for answer in good if answer["prompt"] == "abc"}) == 1, "greedy"


def test_a_batch_may_be_messages(tiny_model_dir: Path) -> None:
    """The example's actor, without Ray round it."""
    answer = runpy.run_path(str(EXAMPLE))["Answer"]
    sampling = SamplingParams(temperature=0.0, max_tokens=3)
    as_chat, as_text = (answer(str(tiny_model_dir), sampling, is_chat) for is_chat in (True, False))
    batch = {"prompt": numpy.array(["abc", ""], dtype=object)}
    (hello,) = as_chat._llm.chat([{"role": "user", "content": "abc"}], sampling=sampling)
    assert as_chat(batch)["text"][0] == hello.text
    assert as_chat(batch)["error"] == ["", ""]
    assert [bool(error) for error in as_text(batch)["error"]] == [False, True]
