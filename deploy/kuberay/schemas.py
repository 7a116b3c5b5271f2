"""Rendered objects held against schemas: Kubernetes' own, KubeRay's where at hand, a ServiceMonitor's."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml
from rendered import CLUSTER_KINDS, Object, name_of, pod_groups

KUBERNETES = "1.31"  # the oldest that the manifests are held against
MONITOR = Path(__file__).with_name("servicemonitor.schema.yaml")


def faults(objects: tuple[Object, ...]) -> Iterator[str]:
    """Of every pod, and of every object but Ray's own. Unknown fields are faults."""
    for one in objects:
        if one["kind"] == "ServiceMonitor":
            yield from _schema_faults(one, _closed(yaml.safe_load(MONITOR.read_text())))
        elif one["kind"] not in CLUSTER_KINDS:
            yield from _kind_faults(one)
    for group in pod_groups(objects):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": group.part}}
        yield from _kind_faults({**pod, "spec": group.template["spec"]})


def ray_faults(objects: tuple[Object, ...], crds: Path) -> Iterator[str]:
    """Of Ray's objects, by the definitions in the folder `crds`."""
    for one in objects:
        if one["kind"] in CLUSTER_KINDS:
            yield from _schema_faults(
                one, _crd_schema(crds, one["kind"], one["apiVersion"].partition("/")[2])
            )


def _kind_faults(one: Object) -> Iterator[str]:
    try:
        kubernetes_validate.validate(one, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        yield f"{name_of(one)}: {'.'.join(map(str, error.path))}: {error.message}"


def _schema_faults(one: Object, schema: Object) -> Iterator[str]:
    for error in jsonschema.Draft202012Validator(schema).iter_errors(one):
        yield f"{name_of(one)}: {'.'.join(map(str, error.path))}: {error.message}"


@cache
def _crd_schema(crds: Path, kind: str, version: str) -> Object:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # a megabyte: 1 s in C, 10 s in Python
    definition = yaml.load((crds / f"ray.io_{kind.lower()}s.yaml").read_text(), Loader=loader)
    (schema,) = (
        one["schema"]["openAPIV3Schema"] for one in definition["spec"]["versions"] if one["name"] == version
    )
    closed = _closed(schema)
    closed["properties"]["metadata"] = {"type": "object"}
    return closed


def _closed(schema: Any) -> Any:
    """The same schema, that refuses fields it does not list: Kubernetes would drop them without a word."""
    if isinstance(schema, list):
        return [_closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: _closed(value) for key, value in schema.items()}
    if isinstance(made.get("properties"), dict) and "additionalProperties" not in made:
        made["additionalProperties"] = bool(made.get("x-kubernetes-preserve-unknown-fields"))
    return made
