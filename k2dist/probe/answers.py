"""Several Ray calls under way at once, all within one deadline: who answered, and why the others did not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Generic, NamedTuple, TypeVar

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

K = TypeVar("K")


class Answers(NamedTuple, Generic[K]):
    """By whoever was asked. `silent`: the reason, in one line."""

    given: dict[K, Any]
    silent: dict[K, str]


def await_answers(asked: Mapping[K, Any], deadline_s: float) -> Answers[K]:
    """Of calls under way, by whom was asked; returns after `deadline_s` at the latest."""
    if not asked:
        return Answers({}, {})
    ready, _ = ray.wait(list(asked.values()), num_returns=len(asked), timeout=deadline_s)
    answers: Answers[K] = Answers({}, {})
    for who, ref in asked.items():
        if ref not in ready:
            answers.silent[who] = f"did not answer within {deadline_s:g} s"
            continue
        try:
            answers.given[who] = ray.get(ref)
        except RayError as error:
            answers.silent[who] = _why(error)
    return answers


def _why(error: RayError) -> str:
    """Ray's own messages are paragraphs; what a constructor raised is their last line."""
    if isinstance(error, RayTaskError):
        return f"{type(error.cause).__name__}: {error.cause}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, RayActorError) and "creation task" in str(error):
        return f"k2dist does not start there: {lines[-1]}"
    return f"its process is gone: {lines[0] if lines else type(error).__name__}"
