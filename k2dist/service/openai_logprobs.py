"""Logprobs in OpenAI's two forms, and a prompt that is shown before its answers, with its own. Pure.

chat:         one object a token, with its bytes
completions:  four lists, one entry a token, with the token's place in the text
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from k2dist.messages import TokenLogprob
from k2dist.service.answer_events import Accepted, AnswerEvent, PromptLogprobs

Spelling = Mapping[int, bytes]  # of the tokens that came with logprobs


class Echo(NamedTuple):
    """A prompt to be shown before its answers; `first_token`: of which there is no logprob."""

    text: str = ""
    first_token: bytes = b""


class EchoLogprobs:
    """A prompt's text, and the logprobs of its tokens as they come."""

    def __init__(self, echo: Echo, *, is_scored: bool) -> None:
        self.text = echo.text
        self._first_token = echo.first_token
        self._is_scored = is_scored
        self._num_missing = 0
        self._logprobs: list[TokenLogprob] = []

    @property
    def is_whole(self) -> bool:
        return self._num_missing <= 0

    def add(self, event: AnswerEvent) -> None:
        if isinstance(event, Accepted) and self._is_scored:
            self._num_missing = event.prompt_tokens - 1
        elif isinstance(event, PromptLogprobs):
            self._logprobs += event.logprobs
            self._num_missing -= len(event.logprobs)

    def form(self, spelling: Spelling) -> dict[str, Any]:
        """With the prompt's first token, of which nothing is known."""
        offset = _num_characters(self._first_token)
        form, _ = completion_logprobs(self._logprobs, spelling, offset)
        first = {"tokens": _shown(self._first_token), "token_logprobs": None, "top_logprobs": None}
        return {name: [first.get(name, 0), *entries] for name, entries in form.items()}


def chat_logprobs(logprobs: Sequence[TokenLogprob], spelling: Spelling) -> dict[str, Any]:
    return {"content": [_chat_logprob(entry, spelling) for entry in logprobs], "refusal": None}


def completion_logprobs(
    logprobs: Iterable[TokenLogprob], spelling: Spelling, offset: int
) -> tuple[dict[str, Any], int]:
    """Four lists, one entry a token; the sampled token is among the likeliest, as OpenAI has it."""
    form: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for entry in logprobs:
        raw = spelling[entry.token_id]
        top = {_shown(spelling[token_id]): logprob for token_id, logprob in entry.top}
        form["tokens"].append(_shown(raw))
        form["token_logprobs"].append(entry.logprob)
        form["top_logprobs"].append({_shown(raw): entry.logprob} | top)
        form["text_offset"].append(offset)
        offset += _num_characters(raw)
    return form, offset


def _chat_logprob(entry: TokenLogprob, spelling: Spelling) -> dict[str, Any]:
    top = [_chat_token(token_id, logprob, spelling) for token_id, logprob in entry.top]
    return _chat_token(entry.token_id, entry.logprob, spelling) | {"top_logprobs": top}


def _chat_token(token_id: int, logprob: float, spelling: Spelling) -> dict[str, Any]:
    raw = spelling[token_id]
    return {"token": raw.decode(errors="replace"), "logprob": logprob, "bytes": list(raw)}


def _shown(raw: bytes) -> str:
    """A token as OpenAI's completions spell one that is no whole characters: bytes:\\xe3\\x81."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _num_characters(raw: bytes) -> int:
    """Characters that begin in these bytes."""
    return sum(byte & 0xC0 != 0x80 for byte in raw)
