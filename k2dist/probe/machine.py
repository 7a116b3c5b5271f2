"""Facts of the machine on which this runs: a fraction of a second, unless the disk is to be measured."""

from __future__ import annotations

import platform
import resource
import shutil
import socket
from pathlib import Path

import msgspec
import psutil

from k2dist.config.cluster import split_address
from k2dist.config.installed import MODEL_FILES, code_digest, files_digest, version_of
from k2dist.doctor.facts import Limits, ModelOnNode, NodeFacts, Port, Versions
from k2dist.messages import Message
from k2dist.probe.disk import measure_disk
from k2dist.probe.gpus import find_gpus
from k2dist.probe.interfaces import find_nics, find_rdma

DISK_BYTES = 4 * 2**30  # at most read to measure a disk, and at most so long
DISK_S = 3.0
DISK_LEAST_BYTES = 64 * 2**20  # of less, a rate says nothing
_INDEX = "model.safetensors.index.json"
_CGROUPS = (  # limit and use, of version 2 and 1; what a container may have
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
    ),
)
# Of the native kernels: what each of their instruction sets asks of a CPU, best first.
_INSTRUCTIONS = {
    "amx": {"amx_tile", "amx_bf16", "avx512_bf16"},
    "avx512_bf16": {"avx512_bf16", "avx512f", "avx512bw", "avx512vl", "avx512dq"},
    "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq"},
    "avx2": {"avx2", "fma"},
}


class Wanted(Message, frozen=True, kw_only=True):
    """What to look at besides the machine itself. `ports`: on the coordinator's node only."""

    model_dir: str | None = None
    measures_disk: bool = False
    ports: tuple[Port, ...] = ()


def node_facts(node: str, wanted: Wanted) -> NodeFacts:
    """This machine's, under the name `node`."""
    gpus, no_gpus_reason = find_gpus()
    memory_bytes, free_bytes = _memory()
    shm = shutil.disk_usage("/dev/shm")
    cpu, flags = _cpu()
    return NodeFacts(
        node=node,
        versions=_versions(),
        cpu=cpu,
        instructions=next((name for name, asks in _INSTRUCTIONS.items() if asks <= flags), ""),
        num_cores=psutil.cpu_count() or 1,
        memory_bytes=memory_bytes,
        free_bytes=free_bytes,
        shm_bytes=shm.total,
        shm_free_bytes=shm.free,
        limits=_limits(),
        nics=find_nics(),
        rdma=find_rdma(),
        gpus=gpus,
        no_gpus_reason=no_gpus_reason,
        settings=_settings(),
        model=None if wanted.model_dir is None else _model(Path(wanted.model_dir), wanted.measures_disk),
        ports=tuple(_try(port) for port in wanted.ports),
    )


def own_address() -> str:
    """The first address of version 4 by which others could know this machine; loopback if there is none."""
    for nic in find_nics():
        for address in nic.addresses:
            if not nic.is_loopback and nic.is_up and ":" not in address:
                return address
    return "127.0.0.1"


def _versions() -> Versions:
    return Versions(
        python=platform.python_version(),
        torch=version_of("torch"),
        ray=version_of("ray"),
        triton=version_of("triton"),
        k2dist=version_of("k2dist"),
        k2dist_code=code_digest("k2dist"),
        kernels_code=code_digest("k2kernels"),
    )


def _cpu() -> tuple[str, set[str]]:
    """Its name and its flags, of the first core; empty where the kernel lists none."""
    fields: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    return fields.get("model name", platform.machine()), set(fields.get("flags", "").split())


def _memory() -> tuple[int, int]:
    """In all and free: the machine's, or the container's where it has less."""
    machine = psutil.virtual_memory()
    for limit_path, used_path, stat_path in _CGROUPS:
        limit = _number(limit_path)
        if limit is not None and limit < machine.total:
            used = (_number(used_path) or 0) - _inactive_bytes(Path(stat_path))
            return limit, min(machine.available, max(limit - used, 0))
    return machine.total, machine.available


def _number(path: str) -> int | None:
    """None where there is no such file, or no limit ("max")."""
    try:
        text = Path(path).read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _inactive_bytes(stat: Path) -> int:
    """Page cache that a container counts as used and that goes when it is needed."""
    rows = dict(line.split(maxsplit=1) for line in stat.read_text().splitlines()) if stat.is_file() else {}
    return int(rows.get("total_inactive_file", rows.get("inactive_file", "0")))


def _limits() -> Limits:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return Limits(num_files=_limit(soft), num_files_max=_limit(hard), memlock_bytes=_limit(locked))


def _limit(value: int) -> int | None:
    return None if value == resource.RLIM_INFINITY else value


def _settings() -> dict[str, str]:
    """As a fact about this process, which inherits them from its raylet; nothing here is steered by them."""
    inherited = psutil.Process().environ()
    return {name: value for name, value in sorted(inherited.items()) if name.startswith(("NCCL_", "GLOO_"))}


def _model(model_dir: Path, measures_disk: bool) -> ModelOnNode:
    files = sorted(model_dir.glob("*.safetensors"))
    reason = _why_not(model_dir, files)
    if reason:
        return ModelOnNode(reason=reason)
    rate, num_bytes = None, sum(path.stat().st_size for path in files)
    if measures_disk and num_bytes >= DISK_LEAST_BYTES:
        largest_first = sorted(files, key=lambda path: -path.stat().st_size)
        rate = measure_disk(largest_first, max_bytes=DISK_BYTES, max_s=DISK_S).bytes_per_s
    return ModelOnNode(
        digest=files_digest(model_dir, MODEL_FILES),
        num_bytes=num_bytes,
        filesystem=_filesystem(model_dir),
        read_bytes_per_s=rate,
    )


def _why_not(model_dir: Path, files: list[Path]) -> str:
    """Empty if all files that the index names are there."""
    if not model_dir.is_dir():
        return f"{model_dir}: no such directory"
    index = model_dir / _INDEX
    if not index.is_file():
        return "" if files else f"{model_dir}: no safetensors file in it"
    try:
        named = set(msgspec.json.decode(index.read_bytes(), type=_Index).weight_map.values())
    except (OSError, msgspec.DecodeError) as error:
        return f"{index}: {error}"
    missing = sorted(named - {path.name for path in files})
    return f"{model_dir}: {len(missing)} of {len(named)} files missing, {missing[0]} first" if missing else ""


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def _filesystem(directory: Path) -> str:
    """The kind of the mount that is nearest above it."""
    above = {str(path) for path in (directory.resolve(), *directory.resolve().parents)}
    mounts = [part for part in psutil.disk_partitions(all=True) if part.mountpoint in above]
    return max(mounts, key=lambda part: len(part.mountpoint)).fstype if mounts else ""


def _try(port: Port) -> Port:
    """The same with the reason why nobody can listen there now, if nobody can."""
    parts = split_address(port.address)
    assert parts is not None, "the config was checked"
    family = socket.AF_INET6 if ":" in parts[0] else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do
        try:
            probe.bind(parts)
        except OSError as error:
            return Port(field=port.field, address=port.address, reason=error.strerror or str(error))
    return port
