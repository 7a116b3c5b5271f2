"""Several conversations at once on one screen: a panel each on a terminal, lines with a prefix elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

_LINE_CHARS = 28  # one conversation's before the next line, where there is no terminal


@dataclass(frozen=True, slots=True)
class Talk:
    """One conversation to hold. `tool_names`: which of the demo's tools the model may call."""

    name: str
    question: str
    tool_names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Chunk:
    """What conversation number `index` adds; None: it has ended."""

    index: int
    text: str | None


def watch_talks(talks: tuple[Talk, ...], chunks: SimpleQueue[Chunk], *, is_quiet: bool, out: TextIO) -> None:
    """Show chunks as they come, until every conversation has ended."""
    coming = _until_all_end(len(talks), chunks)
    if is_quiet:
        for _ in coming:
            pass
    elif out.isatty():
        _show_panels(talks, coming, out)
    else:
        _show_lines(talks, coming, out)


def _until_all_end(num_talks: int, chunks: SimpleQueue[Chunk]) -> Iterator[Chunk]:
    num_ended = 0
    while num_ended < num_talks:
        chunk = chunks.get()
        num_ended += chunk.text is None
        yield chunk


def _show_panels(talks: tuple[Talk, ...], coming: Iterator[Chunk], out: TextIO) -> None:
    texts = [""] * len(talks)
    panels = [Panel(Text(), title=talk.question, title_align="left") for talk in talks]
    with Live(Group(*panels), console=Console(file=out), refresh_per_second=20) as live:
        for chunk in coming:
            if chunk.text is None:
                panels[chunk.index].border_style = "green"
            else:
                texts[chunk.index] += chunk.text
                panels[chunk.index].renderable = Text(texts[chunk.index])
            live.update(Group(*panels))


def _show_lines(talks: tuple[Talk, ...], coming: Iterator[Chunk], out: TextIO) -> None:
    """Each line is some of one conversation, in the order in which it came."""
    width = max(len(talk.name) for talk in talks)
    pending = [""] * len(talks)
    for talk in talks:
        print(f"{talk.name:>{width}} ? {talk.question}", file=out, flush=True)
    for chunk in coming:
        pending[chunk.index] += chunk.text or ""
        line = pending[chunk.index]
        if line and (chunk.text is None or len(line) >= _LINE_CHARS or line.endswith("\n")):
            shown = line.rstrip("\n").replace("\n", "\\n")
            print(f"{talks[chunk.index].name:>{width}} | {shown}", file=out, flush=True)
            pending[chunk.index] = ""
