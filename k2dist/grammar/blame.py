"""Which keyword of a schema is at fault, where the compiler's words do not say so."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from k2dist.grammar.schema import inner_schemas

# Each compiles the whole schema: 3 ms for most of 4 kB, at most some 0.3 s. 64 kB are tried 4 times.
_MAX_TRIALS = 24
_MAX_TRIED_BYTES = 256 * 1024

Path = tuple[str | int, ...]


def keyword_at_fault(text: str, fault: str, is_refused: Callable[[str], bool]) -> str:
    """The place of the keyword without which `text`, a schema's JSON, would be taken: `properties.a.items`.

    Of several one that `fault` names, else the innermost, then the first. A fault between keywords names the
    outermost, and is no guide. Empty: no single one, or the search would be too long.
    """
    guide = "" if "Unsatisfiable" in fault else fault
    schema = json.loads(text)
    paths = sorted(_keyword_paths(schema), key=lambda path: str(path[-1]) not in guide)
    for path in paths[: min(_MAX_TRIALS, _MAX_TRIED_BYTES // len(text))]:
        if not is_refused(json.dumps(_without(schema, path), ensure_ascii=False)):
            return ".".join(map(str, path))
    return ""


def _keyword_paths(schema: Any) -> Iterator[Path]:
    """Of all keywords of a schema and of those in it; what is inside of one comes before it.

    `type` is the last of its part: without it most others bind nothing, and any fault of theirs is gone.
    """
    if not isinstance(schema, dict):
        return
    for keyword in sorted(schema, key="type".__eq__):
        for place, inner in inner_schemas(keyword, schema[keyword]):
            yield from ((keyword, *place, *path) for path in _keyword_paths(inner))
        yield (keyword,)


def _without(value: Any, path: Path) -> Any:
    """A copy, as far as it differs."""
    first, *rest = path
    if isinstance(value, list):
        return [_without(item, tuple(rest)) if i == first else item for i, item in enumerate(value)]
    if rest:
        return {**value, first: _without(value[first], tuple(rest))}
    return {key: item for key, item in value.items() if key != first}
