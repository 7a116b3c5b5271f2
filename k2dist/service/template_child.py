"""A process that renders a chat template and does nothing else; `template_process` starts and ends it.

stdin and stdout carry frames: four bytes of length, then JSON. First the template's source, then a context
at a time; each is answered with `text`, with `refused` (the template raised on purpose) or with `broken`.
"""

from __future__ import annotations

import json
import resource
import struct
import sys
from collections.abc import Callable
from typing import IO, Any, NoReturn

from jinja2 import Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_CHARS = 2**25  # of a prompt: twice what a request may have
_MAX_MORE_BYTES = 2**29  # of memory, besides what the interpreter has before it sees a template
_LENGTH = struct.Struct(">I")


class RefusedError(Exception):
    """The template called `raise_exception`."""


def compile_template(source: str) -> Template:
    """As transformers makes one: blocks trimmed, `tojson` without HTML's escapes, loop controls."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _refuse
    return environment.from_string(source)


def render(template: Template, context: dict[str, Any]) -> dict[str, str]:
    parts: list[str] = []
    num_chars = 0
    try:
        for part in template.generate(**context):
            parts.append(part)
            num_chars += len(part)
            if num_chars > MAX_CHARS:
                return {"broken": f"it writes more than {MAX_CHARS} characters"}
    except RefusedError as error:
        return {"refused": str(error)}
    except MemoryError:
        return {"broken": "it needs more memory than it is given"}
    except Exception as error:  # noqa: BLE001  whatever a foreign program may raise
        return {"broken": f"{type(error).__name__}: {error}"}
    return {"text": "".join(parts)}


def read_frame(stream: IO[bytes]) -> Any:
    """EOFError at the end of the stream."""
    head = stream.read(_LENGTH.size)
    data = stream.read(_LENGTH.unpack(head)[0]) if len(head) == _LENGTH.size else b""
    if not data:
        raise EOFError
    return json.loads(data)


def write_frame(stream: IO[bytes], value: object) -> None:
    data = json.dumps(value).encode()
    stream.write(_LENGTH.pack(len(data)) + data)
    stream.flush()


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _refuse(message: str) -> NoReturn:
    raise RefusedError(message)


def _bound_memory() -> None:
    with open("/proc/self/statm", "rb") as statm:
        num_pages = int(statm.read().split()[0])
    num_bytes = num_pages * resource.getpagesize() + _MAX_MORE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (num_bytes, num_bytes))


def main(stdin: IO[bytes], stdout: IO[bytes], bound_memory: Callable[[], None] = _bound_memory) -> None:
    source = read_frame(stdin)
    bound_memory()
    try:
        template = compile_template(source)
    except TemplateError as error:
        line = getattr(error, "lineno", None)
        write_frame(stdout, {"broken": f"{f'line {line}: ' if line else ''}{error}"})
        return
    write_frame(stdout, {"text": ""})
    while True:
        try:
            context = read_frame(stdin)
        except EOFError:
            return
        write_frame(stdout, render(template, context))


if __name__ == "__main__":
    main(sys.stdin.buffer, sys.stdout.buffer)
