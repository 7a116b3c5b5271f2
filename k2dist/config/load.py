"""A cluster's YAML file, read strictly: one pass, and every fault in one error.

msgspec stops at the first fault, so sections and fields are taken one at a time, each against its own type.
"""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import yaml

from k2dist.config.cluster import ClusterConfig, faults_between
from k2dist.errors import ConfigError


def load_cluster(path: Path) -> ClusterConfig:
    """The cluster that `path` describes. Raises `ConfigError` with path, value and remedy of every fault."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path}: cannot be read ({error}); give a cluster YAML, see cluster_configs/"
        ) from error
    return parse_cluster(text, str(path))


def parse_cluster(text: str, source: str) -> ClusterConfig:
    """As `load_cluster`, of YAML text; `source` names it in errors."""
    try:
        document = yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(document, dict):
        raise ConfigError(f"{source}: expected fields such as name and parallel, found {_shown(document)}")
    faults = list(_section_faults(ClusterConfig, document, ""))
    if not faults:
        config = msgspec.convert(document, ClusterConfig)
        faults = list(faults_between(config))
        if not faults:
            return config
    raise ConfigError("\n".join(f"{source}: {fault}" for fault in faults))


def _section_faults(section: type[msgspec.Struct], given: dict[Any, Any], prefix: str) -> Iterator[str]:
    """Faults of each field by itself, nested sections included, in the order in which the type lists them."""
    fields = {field.encode_name: field for field in msgspec.structs.fields(section)}
    for key in given:
        if key not in fields:
            yield f"{prefix}{key}: unknown field{_nearest(str(key), list(fields))}"
    for name, field in fields.items():
        path = prefix + name
        if name not in given:
            if field.required:
                yield f"{path}: missing; it has no default"
        elif isinstance(field.type, type) and issubclass(field.type, msgspec.Struct):
            value = given[name]
            if isinstance(value, dict):
                yield from _section_faults(field.type, value, f"{path}.")
            else:
                yield f"{path}={_shown(value)}: expected a section with fields such as {_some(field.type)}"
        else:
            yield from _value_faults(given[name], field.type, path)


def _value_faults(value: Any, wanted: Any, path: str) -> Iterator[str]:
    try:
        msgspec.convert(value, wanted)
    except msgspec.ValidationError as error:
        reason = str(error)
        if typing.get_origin(wanted) is typing.Literal:
            reason = f"use {' or '.join(map(str, typing.get_args(wanted)))}"
        yield f"{path}={_shown(value)}: {reason[:1].lower()}{reason[1:]}"


def _nearest(key: str, names: list[str]) -> str:
    near = difflib.get_close_matches(key, names, n=1)
    return f"; did you mean {near[0]}?" if near else f"; known here: {', '.join(names)}"


def _some(section: type[msgspec.Struct]) -> str:
    return ", ".join(section.__struct_fields__[:3])


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that is given twice; plain YAML would drop the first in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    "while reading a section", node.start_mark, f"{key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)
