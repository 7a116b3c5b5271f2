"""Prompts from lines, and outputs as JSON lines: what `k2dist generate` reads and writes.

Line i of the output is of prompt i of the input. With one output per prompt:

    {"index": 0, "id": ..., "text": ..., "token_ids": [...], "finish_reason": ..., "seed": ..., "usage": ...}

"id" only where it was given; "tool_calls", "logprobs" and "prompt_logprobs" only where there are any. With
n > 1, "outputs" is a list of objects with text, token_ids, finish_reason, tool_calls and logprobs. An error,
whose field is "line" where the line is not JSON (index 0 is of line 1):

    {"index": 0, "finish_reason": "error", "error": {"field": "prompt", "message": "..."}}
"""

from __future__ import annotations

import contextlib
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Self

import msgspec

from k2dist.errors import RequestError, UsageError
from k2dist.llm import LLM, Ask, Completion, Output, SamplingParams
from k2dist.llm.conversation import read_chat
from k2dist.llm.faults import type_fault
from k2dist.llm.progress import progress_bar
from k2dist.messages import ChatMessage
from k2dist.text import Chat

NUM_ERRORS_SHOWN = 5

Write = Callable[[str], object]


@dataclass(frozen=True, slots=True)
class Line:
    """One prompt, or what is wrong with its line."""

    ask: Ask | RequestError
    id: str | int | None = None


@dataclass(slots=True)
class Errors:
    """Of a batch that has run: how many, and the first few for people."""

    num_prompts: int = 0
    num_errors: int = 0
    first: list[str] = field(default_factory=list)

    def note(self, place: str, output: Output) -> None:
        self.num_prompts += 1
        if output.error is None:
            return
        self.num_errors += 1
        if len(self.first) < NUM_ERRORS_SHOWN:
            self.first.append(f"{place} {self.num_prompts}: {output.error}")

    def lines(self) -> Iterator[str]:
        """None if there was no error."""
        yield from self.first
        if self.num_errors > 0:
            rest = "; of the others see their lines" if self.num_errors > len(self.first) else ""
            have = "has" if self.num_errors == 1 else "have"
            yield f"{self.num_errors} of {self.num_prompts} prompts {have} an error{rest}"


class Batch:
    """Lines that are read as lanes drain, so a file may be of any length. A context: it closes its file."""

    def __init__(self, lines: Iterable[Line], num_lines: int | None, source: IO[bytes] | None = None) -> None:
        self._lines = lines
        self._num_lines = num_lines
        self._source = source

    @classmethod
    def of_texts(
        cls, texts: Iterable[str], sampling: SamplingParams, *, is_chat: bool, system: str | None
    ) -> Batch:
        lines = [Line(Ask(_text_prompt(text, is_chat=is_chat, system=system), sampling)) for text in texts]
        return cls(lines, len(lines))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._source is not None and self._source is not sys.stdin.buffer:
            self._source.close()

    def run(self, llm: LLM, write: Write, *, progress: bool | None) -> Errors:
        """Write a line for each prompt, in order."""
        errors = Errors()
        with progress_bar(self._num_lines, is_shown=progress) as show:
            for index, (line, output) in enumerate(self._outputs(llm)):
                errors.note("prompt" if self._source is None else "line", output)
                write(as_json(index, line.id, output))
                show(output)
        return errors

    def _outputs(self, llm: LLM) -> Iterator[tuple[Line, Output]]:
        waiting: deque[Line] = deque()  # read, and not yet given back

        def asks() -> Iterator[Ask]:
            for line in self._lines:
                waiting.append(line)
                if isinstance(line.ask, Ask):
                    yield line.ask

        def wrong() -> Iterator[tuple[Line, Output]]:
            while waiting and isinstance(error := waiting[0].ask, RequestError):
                yield waiting.popleft(), Output(prompt="", error=error)

        for output in llm.iterate(asks()):
            yield from wrong()
            yield waiting.popleft(), output
        yield from wrong()


def read_texts(path: Path, sampling: SamplingParams, *, is_chat: bool, system: str | None) -> Batch:
    """A prompt a line, without the line's end. UsageError if the file cannot be read."""
    source, num_lines = _open(path, "--file")

    def read(line: bytes) -> Line:
        try:
            text = line.rstrip(b"\r\n").decode()
        except UnicodeDecodeError as error:
            return Line(RequestError("prompt", f"not UTF-8: {error.reason} at byte {error.start}"))
        return Line(Ask(_text_prompt(text, is_chat=is_chat, system=system), sampling))

    return Batch(map(read, source), num_lines, source)


def read_jsonl(path: Path, given: Mapping[str, Any]) -> Batch:
    """`given`: fields of SamplingParams for lines that do not say them. UsageError as `read_texts`."""
    source, num_lines = _open(path, "--jsonl")
    lines = (_read_line(text, given) for text in source)
    return Batch(lines, num_lines, source)


@contextmanager
def open_output(path: Path | None) -> Iterator[Write]:
    """What writes a line, to the file or to stdout. UsageError if the file cannot be written."""
    with contextlib.ExitStack() as stack:
        target = sys.stdout
        if path is not None:
            try:
                target = stack.enter_context(path.open("w", encoding="utf-8"))
            except OSError as error:
                raise UsageError(
                    f"--out {path}: {error.strerror}; give a file that can be written"
                ) from error
        yield lambda line: print(line, file=target, flush=True)


def as_json(index: int, line_id: str | int | None, output: Output) -> str:
    """See the module."""
    shown: dict[str, Any] = {"index": index}
    if line_id is not None:
        shown["id"] = line_id
    if output.error is not None:
        error = {"field": output.error.field, "message": output.error.message}
        shown |= {"finish_reason": output.finish_reason, "error": error}
        return msgspec.json.encode(shown).decode()
    if len(output.outputs) == 1:
        shown |= _shown(output.outputs[0])
    else:
        shown["outputs"] = [_shown(completion) for completion in output.outputs]
    if output.prompt_logprobs is not None:
        shown["prompt_logprobs"] = output.prompt_logprobs
    assert output.sampling is not None, "an output without error has its sampling"
    shown |= {"seed": output.sampling.seed, "usage": output.usage}
    return msgspec.json.encode(shown).decode()


def _shown(completion: Completion) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
    }
    if completion.tool_calls:
        shown["tool_calls"] = completion.tool_calls
    if completion.logprobs is not None:
        shown["logprobs"] = completion.logprobs
    return shown


class _JsonLine(msgspec.Struct, forbid_unknown_fields=True):
    prompt: str | list[int] | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] = []
    sampling: msgspec.Raw = msgspec.Raw(b"{}")
    id: str | int | None = None


def _read_line(text: bytes, given: Mapping[str, Any]) -> Line:
    if not text.strip():
        return Line(RequestError("line", "empty; give a JSON object in each line"))
    try:
        read = msgspec.json.decode(text, type=_JsonLine)
    except msgspec.ValidationError as error:
        return Line(type_fault("", error))
    except msgspec.DecodeError as error:
        return Line(RequestError("line", str(error)))
    try:
        return Line(Ask(_json_prompt(read), _json_sampling(read.sampling, given)), read.id)
    except RequestError as error:
        return Line(error, read.id)


def _json_prompt(line: _JsonLine) -> str | list[int] | Chat:
    if line.messages is not None:
        if line.prompt is not None:
            raise RequestError("prompt", "given beside messages; give one of the two")
        return read_chat(line.messages, line.tools)
    if line.prompt is None:
        raise RequestError("prompt", "missing; give prompt or messages")
    if line.tools:
        raise RequestError("tools", "need a conversation; give messages")
    return line.prompt


def _json_sampling(said: msgspec.Raw, given: Mapping[str, Any]) -> SamplingParams:
    """Only what the line says wins over `given`, a null as well: it is the model's default."""
    return SamplingParams(**{**given, **sampling_fields(said)})


def sampling_fields(said: bytes | msgspec.Raw) -> dict[str, Any]:
    """The fields of SamplingParams that a JSON object names; RequestError for a wrong one."""
    try:
        params = msgspec.json.decode(said, type=SamplingParams)
    except msgspec.ValidationError as error:
        raise type_fault("sampling", error) from error
    except msgspec.DecodeError as error:
        raise RequestError("sampling", str(error)) from error
    names = msgspec.json.decode(said, type=dict[str, msgspec.Raw])
    return {name: getattr(params, name) for name in names}


def _text_prompt(text: str, *, is_chat: bool, system: str | None) -> str | Chat:
    if not is_chat:
        return text
    head = () if system is None else (ChatMessage(role="system", content=system),)
    return Chat(messages=(*head, ChatMessage(role="user", content=text)))


def _open(path: Path, option: str) -> tuple[IO[bytes], int | None]:
    """The file, and how many lines it has; nobody knows of stdin."""
    if str(path) == "-":
        return sys.stdin.buffer, None
    try:
        with path.open("rb") as counted:
            num_lines = sum(1 for _ in counted)
        return path.open("rb"), num_lines
    except OSError as error:
        raise UsageError(f"{option} {path}: {error.strerror}; give a file that can be read") from error
