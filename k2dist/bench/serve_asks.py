"""What a load test asks: prompts made up to a length, or those of a file. Pure."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

from k2dist.errors import UsageError
from k2dist.messages import Message

# Of made-up prompts: K2's vocabulary begins with the single bytes, as the demo's does, and these are letters
# there. No two prompts begin alike, so nothing of them is in the cache.
_LETTER_IDS = range(32, 64)


class Ask(Message, frozen=True, kw_only=True):
    """One request: token ids, or the body of a chat as OpenAI has it. `max_tokens` None: the server's."""

    token_ids: tuple[int, ...] = ()
    chat: dict[str, Any] | None = None
    max_tokens: int | None = None
    runs_full: bool = False  # end tokens do not end it


def made_up(input_len: int, output_len: int, seed: int) -> Iterator[Ask]:
    """Without end; each answer has exactly `output_len` tokens."""
    draw = random.Random(seed)
    while True:
        token_ids = tuple(draw.choices(_LETTER_IDS, k=input_len))
        yield Ask(token_ids=token_ids, max_tokens=output_len, runs_full=True)


def of_file(path: Path, output_len: int | None, seed: int) -> Iterator[Ask]:
    """A line of JSON each, in a drawn order, over and over: a body with `messages`, or with a `prompt`.

    Answers end where they end, at `output_len` at the latest. UsageError: no such file, or a line that is
    neither.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--dataset={path}: {error}") from error
    asks = [_read(f"{path}:{number}", line, output_len) for number, line in enumerate(lines, 1) if line]
    if not asks:
        raise UsageError(f"--dataset={path}: empty; give a line of JSON for each request")
    random.Random(seed).shuffle(asks)
    return cycle(asks)


def _read(place: str, line: str, output_len: int | None) -> Ask:
    try:
        body = json.loads(line)
    except ValueError as error:
        raise UsageError(f"{place}: not JSON: {error}") from error
    if not isinstance(body, dict):
        raise UsageError(f"{place}: not a JSON object")
    if isinstance(body.get("prompt"), str):
        body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
    if not isinstance(body.get("messages"), list):
        raise UsageError(f"{place}: needs `messages`, a list, or `prompt`, a text")
    return Ask(chat=body, max_tokens=output_len)
