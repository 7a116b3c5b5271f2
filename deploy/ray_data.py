"""Answer a data set of prompts with Ray Data: actors, each with a model of its own; JSON lines in and out.

    python deploy/ray_data.py --model DIR --prompts prompts.jsonl --out answers --chat

A row of `prompts.jsonl` is {"prompt": "text"} and whatever else it has. With --chat each prompt is a user's
message to the assistant, else text to go on with. Rows come out in their order, with
`text`, `finish_reason` and `error` beside the rest. Needs `pip install 'ray[data]'`. Set RAY_ADDRESS for a
cluster that runs; without it Ray starts here.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import ray
import ray.data

from k2dist import LLM, SamplingParams


class Answer:
    """One actor: the model is loaded once, and each batch is answered as a whole."""

    def __init__(self, model_dir: str, sampling: SamplingParams, is_chat: bool) -> None:
        self._llm = LLM(model_dir)
        self._sampling = sampling
        self._is_chat = is_chat

    def __call__(self, batch: dict[str, np.ndarray[Any, Any]]) -> dict[str, Any]:
        texts = batch["prompt"].tolist()
        if self._is_chat:
            questions = [[{"role": "user", "content": text}] for text in texts]
            outputs = self._llm.chat(questions, sampling=self._sampling)
        else:
            outputs = self._llm.generate(texts, self._sampling)
        return batch | {
            "text": [output.text for output in outputs],
            "finish_reason": [output.finish_reason for output in outputs],
            "error": ["" if output.error is None else str(output.error) for output in outputs],
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", required=True, help="model directory, the same on every node")
    parser.add_argument("--prompts", required=True, help="JSON lines, or a directory of them")
    parser.add_argument("--out", required=True, help="directory of JSON lines")
    parser.add_argument("--chat", action="store_true", help="prompts are messages of a user")
    parser.add_argument("--actors", type=int, default=1, help="each loads the whole model")
    parser.add_argument("--batch-size", type=int, default=256, help="rows per call; more: fuller steps")
    parser.add_argument("--max-tokens", type=int, default=64)
    asked = parser.parse_args()

    sampling = SamplingParams(temperature=0.0, max_tokens=asked.max_tokens)
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    (
        ray.data.read_json(asked.prompts)
        .map_batches(
            Answer,
            fn_constructor_args=(asked.model, sampling, asked.chat),
            batch_size=asked.batch_size,
            compute=ray.data.ActorPoolStrategy(size=asked.actors),
            num_cpus=1,
        )
        .write_json(asked.out)
    )


if __name__ == "__main__":
    main()
