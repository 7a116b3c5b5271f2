"""What grammar masks cost a rank's host, at a vocabulary's full size: per token, and of a step in all.

Some outputs stand at different places of different constraints. In each step the masks of all are made, as
`engine.masks` makes them, and each output takes a token that its mask allows: the next one of a text made
beforehand, or where that is not allowed (with a random vocabulary) a random one.
"""

from __future__ import annotations

import gc
import json
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from k2dist.errors import UsageError
from k2dist.grammar import Grammars, Mask, mask_threads
from k2dist.messages import CallableTool, Constraint, JsonObject, JsonSchema, Message, Regex, ToolCalls
from k2dist.text.tokenizer import (
    K2_SPECIALS,
    VOCABULARY_FILE,
    Tokenizer,
    end_token_ids,
    read_vocabulary,
)

STEP_MS = 25.0  # a decode step of K2 on GPUs, of which the masks should be a small part
NUM_OUTPUTS = 32
NUM_STEPS = 500
NUM_THREADS = mask_threads(os.cpu_count() or 1)
_K2_VOCABULARY = 163_584


class CompileCost(Message, frozen=True, kw_only=True):
    """Of a constraint that is not yet known."""

    name: str
    num_bytes: int  # of its schemas
    compile_ms: float


class Spread(Message, frozen=True, kw_only=True):
    mean: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(mean=float(np.mean(values)), p99=float(np.percentile(values, 99)))


class GrammarCost(Message, frozen=True, kw_only=True):
    """A step: taking all outputs' tokens, and making their next masks, by `num_threads`.

    `mask_ms` and the cpu times are of one thread, these by its own clock: they depend less on what else runs.
    """

    vocabulary: str  # where it is from
    vocab_size: int
    tokenizer_s: float  # llguidance's, made once in a process
    num_outputs: int
    num_steps: int
    num_threads: int
    step_ms: Spread
    mask_ms: Spread
    mask_cpu_ms: Spread
    step_cpu_ms: Spread
    compiled: tuple[CompileCost, ...]


@dataclass(frozen=True, slots=True)
class _Case:
    name: str
    constraint: Constraint
    answers: tuple[str, ...]  # which end well; marks of tool calls by name


def measure(
    vocabulary: Path | None = None,
    *,
    num_outputs: int = NUM_OUTPUTS,
    num_steps: int = NUM_STEPS,
    num_threads: int = NUM_THREADS,
    seed: int = 0,
    note: Callable[[], object] = lambda: None,
) -> GrammarCost:
    """`vocabulary`: a `tiktoken.model`; None: a random one of K2's size. `note`: called after each step."""
    for name, value in (("outputs", num_outputs), ("steps", num_steps), ("threads", num_threads)):
        if value < 1:
            raise UsageError(f"--{name}={value}: use at least 1")
    draw = random.Random(seed)
    tokens = _random_vocabulary(draw) if vocabulary is None else read_vocabulary(vocabulary)
    tokenizer = Tokenizer(tokens, {len(tokens) + offset: name for offset, name in K2_SPECIALS.items()})
    started_s = time.perf_counter()
    grammars = Grammars(tokenizer, end_token_ids(tokenizer, None), num_threads=num_threads)
    tokenizer_s = time.perf_counter() - started_s
    compiled = tuple(_compile_cost(case, grammars) for case in _cases())
    cases = _cases()
    outputs = [_Output(tokenizer, grammars, cases, number, draw) for number in range(num_outputs)]
    gc.collect()
    gc.freeze()  # as a rank does, once it has loaded
    times = _times(outputs, grammars, draw, num_steps, note)
    gc.unfreeze()
    return GrammarCost(
        vocabulary="random" if vocabulary is None else vocabulary.name,
        vocab_size=tokenizer.vocab_size,
        tokenizer_s=tokenizer_s,
        num_outputs=num_outputs,
        num_steps=num_steps,
        num_threads=num_threads,
        step_ms=Spread.of(times.step_ms),
        mask_ms=Spread.of(times.mask_ms),
        mask_cpu_ms=Spread.of(times.mask_cpu_ms),
        step_cpu_ms=Spread.of(times.step_cpu_ms),
        compiled=compiled,
    )


def default_vocabulary(model_dir: Path | None) -> Path | None:
    """The file of a model directory."""
    return None if model_dir is None else model_dir / VOCABULARY_FILE


class _Output:
    """One output: it takes the tokens of an answer of its case, then begins again with the next."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        grammars: Grammars,
        cases: Sequence[_Case],
        number: int,
        draw: random.Random,
    ) -> None:
        self._tokenizer = tokenizer
        self._grammars = grammars
        self._cases = cases
        self._number = number
        self.begin(draw)

    def begin(self, draw: random.Random | None = None) -> None:
        """With no tokens yet; by `draw` at any place, for else all of a case would go in step."""
        case = self._cases[self._number % len(self._cases)]
        answer = case.answers[self._number // len(self._cases) % len(case.answers)]
        self._number += 1
        token_ids = self._tokenizer.encode(answer, allow_special=True)
        num_taken = 0 if draw is None else draw.randrange(len(token_ids))
        self.state = self._grammars.begin(case.constraint, token_ids[:num_taken])
        self._next: int | None = None
        self._left = token_ids[num_taken:][::-1]

    def take(self) -> None:
        if self._next is not None:
            self.state.advance(self._next)

    def choose(self, mask: Mask, draw: random.Random) -> None:
        """The next token: of the answer, where the mask allows it. At its end, or if it is stuck, begin."""
        if not self._left or self.state.error:
            self.begin()
            return
        self._next = self._left.pop()
        if not mask[self._next // 8] >> self._next % 8 & 1:  # a random vocabulary spells it in another way
            allowed = np.flatnonzero(np.unpackbits(mask, bitorder="little"))
            self._next = int(allowed[draw.randrange(len(allowed))])


@dataclass(frozen=True, slots=True)
class _Times:
    """Milliseconds. Half of the steps go by threads, and are timed as a whole; the other half by one."""

    step_ms: list[float] = field(default_factory=list)
    mask_ms: list[float] = field(default_factory=list)
    mask_cpu_ms: list[float] = field(default_factory=list)
    step_cpu_ms: list[float] = field(default_factory=list)


def _times(
    outputs: Sequence[_Output],
    grammars: Grammars,
    draw: random.Random,
    num_steps: int,
    note: Callable[[], object],
) -> _Times:
    masks = np.zeros((len(outputs), grammars.mask_bytes), dtype=np.uint8)
    times = _Times()
    for step in range(2 * num_steps):
        _time_step(outputs, grammars, masks, times, by_threads=step % 2 == 0)
        for output, mask in zip(outputs, masks, strict=True):
            output.choose(mask, draw)
        if step % 2:
            note()
    return times


def _time_step(
    outputs: Sequence[_Output], grammars: Grammars, masks: Mask, times: _Times, *, by_threads: bool
) -> None:
    began_s, began_cpu_s = time.perf_counter(), time.thread_time()
    for output in outputs:
        output.take()
    if by_threads:
        grammars.masks_into([output.state for output in outputs], masks)
        times.step_ms.append(1e3 * (time.perf_counter() - began_s))
        return
    for output, mask in zip(outputs, masks, strict=True):
        last_s, last_cpu_s = time.perf_counter(), time.thread_time()
        output.state.mask_into(mask)
        times.mask_cpu_ms.append(1e3 * (time.thread_time() - last_cpu_s))
        times.mask_ms.append(1e3 * (time.perf_counter() - last_s))
    times.step_cpu_ms.append(1e3 * (time.thread_time() - began_cpu_s))


def _compile_cost(case: _Case, grammars: Grammars) -> CompileCost:
    started_s = time.perf_counter()
    grammars.check(case.constraint)
    compile_ms = 1e3 * (time.perf_counter() - started_s)
    return CompileCost(name=case.name, num_bytes=_num_bytes(case.constraint), compile_ms=compile_ms)


def _num_bytes(constraint: Constraint) -> int:
    match constraint:
        case ToolCalls(tools=tools):
            return sum(len((tool.parameters or "").encode()) for tool in tools)
        case JsonSchema(schema=schema):
            return len(schema.encode())
        case Regex(pattern=pattern):
            return len(pattern.encode())
        case _:
            return 0


def _random_vocabulary(draw: random.Random) -> list[bytes]:
    """As many tokens as K2 has, of about as many bytes: what a mask costs depends on both."""
    tokens = {bytes([byte]): None for byte in range(256)}
    letters = b"etaoinshrdlu etaoinshrdlu cmfwypvbgkjqxz0123456789.,:_-{}[]\"'"
    while len(tokens) < _K2_VOCABULARY:
        tokens[bytes(draw.choices(letters, k=min(2 + int(draw.expovariate(0.25)), 40)))] = None
    return list(tokens)


def _cases() -> list[_Case]:
    weather = _object(city={"type": "string"}, days={"type": "integer", "minimum": 1, "maximum": 14})
    edit = _object(
        path={"type": "string", "pattern": "^/[a-z0-9_./]{1,80}$"},
        edits={"type": "array", "items": _object(old={"type": "string"}, new={"type": "string"})},
    )
    tree: dict[str, Any] = _object(v={"type": "number"}, children={"type": "array", "items": {"$ref": "#"}})
    tools = tuple(
        CallableTool(name=name, parameters=json.dumps(schema))
        for name, schema in (("get_weather", weather), ("edit_file", edit), ("plan", tree))
    )
    weather_call = _call("get_weather:0", {"city": "北京", "days": 3})
    edit_call = _call("edit_file:1", {"path": "/src/app.py", "edits": [{"old": _PROSE, "new": _PROSE[::-1]}]})
    fields = {f"field_{i:02d}": {"enum": [f"{i}-{j}" for j in range(10)]} for i in range(60)}
    rows = {name: schema["enum"][3] for name, schema in fields.items()}
    return [
        _Case("tools, auto", ToolCalls(tools=tools), (_PROSE + weather_call, _PROSE)),
        _Case("tools, required", ToolCalls(tools=tools, is_required=True), (weather_call, edit_call)),
        _Case("any object", JsonObject(), (json.dumps({"text": _PROSE, "list": [1.5, None, {"a": True}]}),)),
        _Case("recursive", JsonSchema(schema=json.dumps(tree)), (json.dumps(_tree(4)),)),
        _Case("60 enums", JsonSchema(schema=json.dumps(_object(**fields))), (json.dumps(rows),)),
        _Case(
            "regex",
            Regex(pattern=r"([A-Z][a-z]+ ){2,40}[0-9]{4}-[0-9]{2}"),
            ("Some Words In This Row 2024-05",),
        ),
    ]


_PROSE = "The mask hides behind the forward pass, and the schema's strings are long: " + "word by word. " * 8


def _object(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": [*properties],
        "additionalProperties": False,
    }


def _tree(depth: int) -> dict[str, Any]:
    return {"v": depth + 0.25, "children": [_tree(depth - 1)] * 2 if depth else []}


def _call(name: str, arguments: dict[str, Any]) -> str:
    text = json.dumps(arguments, ensure_ascii=False)
    head = f"<|tool_calls_section_begin|><|tool_call_begin|>functions.{name}<|tool_call_argument_begin|>"
    return f"{head}{text}<|tool_call_end|><|tool_calls_section_end|>"
