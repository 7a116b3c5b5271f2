"""One output as text and tool calls, from its tokens.

    token ids -> StopGate (a stop string never shows) -> ToolCallParser on ids, or UTF-8 -> parts

Who ends an output is decided elsewhere; this only says what of it is text. Fed the same tokens again, however
cut, it gives the same text.
"""

from __future__ import annotations

from collections.abc import Iterable

from k2dist.text.stream import StopGate, Utf8Stream
from k2dist.text.tokenizer import Tokenizer
from k2dist.text.tool_calls import ContentDelta, Part, ToolCallParser, Tools


class OutputReader:
    """Reads the tokens of one output, in order.

    `tools`: None for an answer that is only text, in which no special token shows. Otherwise tool calls are
    taken out of the text; `first_call` is how many calls the conversation has had already. Before token
    number `min_tokens` the lane lets no stop string end the output, so none is looked for.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stops: tuple[str, ...] = (),
        min_tokens: int = 0,
        tools: Tools | None = None,
        first_call: int = 0,
    ) -> None:
        self._gate = StopGate(stops, tokenizer.text_bytes, min_tokens=min_tokens) if stops else None
        self._reader: ToolCallParser | _TextReader
        if tools is None:
            self._reader = _TextReader(tokenizer)
        else:
            self._reader = ToolCallParser(tokenizer, tools, first_call=first_call)

    @property
    def num_calls(self) -> int:
        return self._reader.num_calls

    def push(self, token_ids: Iterable[int]) -> tuple[Part, ...]:
        """What these tokens add; some of it may wait for the next ones."""
        if self._gate is None:
            return self._reader.push(token_ids)
        passed = self._gate.push(token_ids)
        return self._reader.push(passed.token_ids) + self._reader.push_bytes(passed.tail)

    def finish(self, *, is_cut: bool) -> tuple[Part, ...]:
        """What was held back, now that nothing can follow.

        `is_cut`: the output was ended from outside (length, stop string, abort) and not by the model.
        """
        held = self._gate.finish().token_ids if self._gate is not None else ()
        return self._reader.push(held) + self._reader.finish(is_cut=is_cut)


class _TextReader:
    """The part of `ToolCallParser`'s face that plain text needs."""

    num_calls = 0

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = Utf8Stream()

    def push(self, token_ids: Iterable[int]) -> tuple[Part, ...]:
        return self.push_bytes(self._tokenizer.decode_bytes(token_ids, skip_special=True))

    def push_bytes(self, data: bytes) -> tuple[Part, ...]:
        return _content(self._utf8.push(data))

    def finish(self, *, is_cut: bool) -> tuple[Part, ...]:
        del is_cut  # half a character is half a character
        return _content(self._utf8.finish())


def _content(text: str) -> tuple[Part, ...]:
    return (ContentDelta(text),) if text else ()
