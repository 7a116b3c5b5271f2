"""What is to be said of one machine by itself. Pure: facts and needs in, findings out.

`num_ranks`: how many ranks it may have to host; 0: it hosts none, and only its network and code matter.
"""

from __future__ import annotations

from collections.abc import Iterator

from k2dist.doctor.facts import Gpu, NodeFacts
from k2dist.doctor.finding import Finding, error, ok, warning
from k2dist.doctor.needs import Needs
from k2dist.planner.memory import gb

CLOCK_OFF_S = 0.5  # logs and traces of two nodes can no longer be put in order
FILES_BASE = 1024  # open files of a process with Ray and a checkpoint
FILES_PER_PEER = 16  # four groups, each with a connection or two to every peer
SHM_LEAST_BYTES = 64 * 2**20  # what a container gets unless it asks for more
SHM_GPU_BYTES = 2**30  # NCCL's buffers between the GPUs of one machine
SLOW_LOAD_S = 600.0


def node_findings(facts: NodeFacts, needs: Needs | None, num_ranks: int) -> Iterator[Finding]:
    """In the order in which a person would look."""
    yield _machine(facts)
    yield from _gpus(facts, needs, num_ranks)
    yield from _memory(facts, needs, num_ranks)
    yield from _shm(facts, needs)
    yield from _limits(facts, needs)
    yield from _clock(facts)
    yield from _model(facts, needs, num_ranks)
    yield from _ports(facts)


def _machine(facts: NodeFacts) -> Finding:
    versions = facts.versions
    software = f"Python {versions.python}, torch {versions.torch or 'absent'}, Ray {versions.ray or 'absent'}"
    kind = f", {facts.instructions}" if facts.instructions else ""
    what = f"{facts.num_cores} cores ({facts.cpu}{kind}), {gb(facts.memory_bytes)}; {software}"
    if not facts.versions.torch:
        return error("machine", what, "its image: install k2dist there with pip", facts.node)
    return ok("machine", what, facts.node)


def _gpus(facts: NodeFacts, needs: Needs | None, num_ranks: int) -> Iterator[Finding]:
    wants_gpus = needs is not None and needs.rank_gpus > 0 and num_ranks > 0
    if not facts.gpus:
        what = f"no GPU ({facts.no_gpus_reason})"
        if wants_gpus:
            remedy = "install the driver, or give this container GPUs; or set ranks.rank_gpus: 0 to use CPUs"
            yield error("gpus", what, remedy, facts.node)
        else:
            yield ok("gpus", what, facts.node)
        return
    first = facts.gpus[0]
    yield ok(
        "gpus",
        f"{len(facts.gpus)} x {first.name}, {gb(first.memory_bytes)}, driver {first.driver}, "
        f"compute capability {first.capability}",
        facts.node,
    )
    for gpu in facts.gpus:
        yield from _gpu(facts.node, gpu)
    if needs is None or not wants_gpus:
        return
    if len(facts.gpus) < num_ranks * needs.rank_gpus:
        what = f"{len(facts.gpus)} GPUs for {num_ranks} ranks x {needs.rank_gpus:g}"
        yield error("gpus", what, "use more nodes, or fewer ranks", facts.node)
    for gpu in facts.gpus:
        if gpu.free_bytes < needs.rank_bytes:
            yield error(
                "gpus",
                f"GPU {gpu.index} has {gb(gpu.free_bytes)} free of {gb(gpu.memory_bytes)}, a rank needs "
                f"{gb(needs.rank_bytes)}",
                "end what holds its memory (`nvidia-smi` lists it), or use fewer pages or more ranks",
                facts.node,
            )
        elif gpu.free_bytes < needs.rank_bytes + needs.reserve_bytes:
            yield warning(
                "gpus",
                f"GPU {gpu.index} has {gb(gpu.free_bytes - needs.rank_bytes)} beyond what is planned, and "
                f"nodes.reserve_bytes wants {gb(needs.reserve_bytes)} for contexts, graphs and NCCL",
                "end what else holds its memory, or lower cache.num_pages",
                facts.node,
            )


def _gpu(node: str, gpu: Gpu) -> Iterator[Finding]:
    if gpu.is_split:
        yield error(
            "gpus",
            f"GPU {gpu.index} is split by MIG",
            "the machine's owner: `nvidia-smi -mig 0`; a rank needs a whole GPU",
            node,
        )
    if gpu.num_ecc_errors:
        yield error(
            "gpus",
            f"GPU {gpu.index} has had {gpu.num_ecc_errors} uncorrected memory errors",
            "the machine's owner: reset or replace it; its results cannot be trusted",
            node,
        )


def _memory(facts: NodeFacts, needs: Needs | None, num_ranks: int) -> Iterator[Finding]:
    free = f"{gb(facts.free_bytes)} free of {gb(facts.memory_bytes)}"
    if needs is None or num_ranks == 0 or needs.rank_gpus > 0:
        yield ok("memory", free, facts.node)
        return
    needed = num_ranks * needs.rank_bytes
    what = f"{free}; {num_ranks} ranks x {gb(needs.rank_bytes)} = {gb(needed)} are planned"
    if needed > facts.free_bytes:
        remedy = "use more nodes or ranks, lower cache.num_pages, or end what else runs there"
        yield error("memory", what, remedy, facts.node)
    elif needed > 0.9 * facts.free_bytes:
        yield warning("memory", what, "Ray kills processes at 95%: lower cache.num_pages", facts.node)
    else:
        yield ok("memory", what, facts.node)


def _shm(facts: NodeFacts, needs: Needs | None) -> Iterator[Finding]:
    what = f"/dev/shm has {gb(facts.shm_free_bytes)} free of {gb(facts.shm_bytes)}"
    remedy = "mount a larger one: emptyDir with medium: Memory, or `docker run --shm-size 8g`"
    store = needs.object_store_bytes if needs is not None else None
    if facts.shm_bytes <= SHM_LEAST_BYTES:
        yield error("/dev/shm", f"{what}: a container's default", remedy, facts.node)
    elif store is not None and facts.shm_free_bytes < store:
        yield error("/dev/shm", f"{what}; ray.object_store_bytes is {gb(store)}", remedy, facts.node)
    elif facts.gpus and facts.shm_free_bytes < SHM_GPU_BYTES:
        yield warning("/dev/shm", f"{what}; NCCL wants {gb(SHM_GPU_BYTES)}", remedy, facts.node)
    else:
        yield ok("/dev/shm", what, facts.node)


def _limits(facts: NodeFacts, needs: Needs | None) -> Iterator[Finding]:
    limits = facts.limits
    wanted = FILES_BASE + FILES_PER_PEER * (1 if needs is None else needs.world_size)
    if limits.num_files is not None and limits.num_files < wanted:
        may = "any number" if limits.num_files_max is None else f"{limits.num_files_max:,}"
        yield error(
            "limits",
            f"{limits.num_files:,} open files (it may raise that to {may}), about {wanted:,} are needed",
            f"start Ray there after `ulimit -n {max(65536, wanted)}`, or LimitNOFILE= of its service",
            facts.node,
        )
    else:
        shown = "no limit on" if limits.num_files is None else f"{limits.num_files:,}"
        yield ok("limits", f"{shown} open files, about {wanted:,} are needed", facts.node)
    if facts.rdma and limits.memlock_bytes is not None:
        yield error(
            "limits",
            f"RDMA devices, and only {gb(limits.memlock_bytes)} of memory may be locked",
            "start Ray there after `ulimit -l unlimited`; in a container, capability IPC_LOCK",
            facts.node,
        )


def _clock(facts: NodeFacts) -> Iterator[Finding]:
    clock = facts.clock
    if clock is None:
        return
    what = f"{clock.offset_s * 1e3:+.1f} ms from the driver's, give or take {clock.error_s * 1e3:.1f} ms"
    if abs(clock.offset_s) - clock.error_s > CLOCK_OFF_S:
        remedy = "run chrony or another NTP client there: logs cannot be put in order"
        yield warning("clock", what, remedy, facts.node)
    else:
        yield ok("clock", what, facts.node)


def _model(facts: NodeFacts, needs: Needs | None, num_ranks: int) -> Iterator[Finding]:
    model = facts.model
    if model is None:
        return
    if model.reason:
        remedy = "mount or copy the same directory on every node, at the same path"
        yield error("model", model.reason, remedy, facts.node)
        return
    what = f"{gb(model.num_bytes)} on {model.filesystem or 'an unknown file system'}"
    if model.read_bytes_per_s is None:
        yield ok("model", what, facts.node)
        return
    what += f", read at {model.read_bytes_per_s / 1e9:.2f} GB/s"
    if needs is None or num_ranks == 0:
        yield ok("model", what, facts.node)
        return
    load_s = num_ranks * needs.read_bytes / model.read_bytes_per_s
    what += f": {num_ranks} ranks x {gb(needs.read_bytes)} in {load_s:,.0f} s"
    if load_s > needs.load_s:
        remedy = f"raise deadlines.load_s={needs.load_s:g}, or put the model on a faster disk"
        yield error("model", what, remedy, facts.node)
    elif load_s > SLOW_LOAD_S:
        yield warning("model", what, "copy it to local NVMe: a replacement rank waits as long", facts.node)
    else:
        yield ok("model", what, facts.node)


def _ports(facts: NodeFacts) -> Iterator[Finding]:
    for port in facts.ports:
        if port.reason:
            yield error(
                "ports",
                f"{port.field}={port.address}: cannot listen there ({port.reason})",
                "end what listens there (`k2dist stop`, if it is k2dist), or choose another in the config",
                facts.node,
            )
        else:
            yield ok("ports", f"{port.field}={port.address} is free", facts.node)
