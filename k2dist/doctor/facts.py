"""What was seen of machines, of the links between them, and of Ray: values, without judgement.

Gathered by `k2dist.probe`, judged by the `*_checks` beside this. A node goes by the address that Ray has for
it. What could not be seen is None, with a `reason` where there is one to give.
"""

from __future__ import annotations

from k2dist.messages import Message


class Gpu(Message, frozen=True, kw_only=True):
    """One device, as its driver reports it. `num_ecc_errors`: uncorrected, since the driver was loaded."""

    index: int
    name: str
    driver: str
    capability: str  # "9.0"
    memory_bytes: int
    free_bytes: int
    is_split: bool  # into MIG instances
    num_ecc_errors: int | None


class Nic(Message, frozen=True, kw_only=True):
    """One network interface. `mbit_per_s`: None where it has no speed of its own, as virtual ones."""

    name: str
    addresses: tuple[str, ...]
    is_up: bool
    mtu: int
    mbit_per_s: int | None
    is_loopback: bool


class Rdma(Message, frozen=True, kw_only=True):
    """One port of an RDMA device, in the kernel's words: ("mlx5_0/1", "ACTIVE", "400 Gb/sec")."""

    name: str
    state: str
    rate: str


class Versions(Message, frozen=True, kw_only=True):
    """What is installed; empty: not there. `*_code`: digests of sources and libraries."""

    python: str
    torch: str
    ray: str
    triton: str
    k2dist: str
    k2dist_code: str
    kernels_code: str


class ModelOnNode(Message, frozen=True, kw_only=True):
    """The model directory as one node has it. `reason`: why it cannot be used there."""

    reason: str = ""
    digest: str = ""  # of config, index and vocabulary
    num_bytes: int = 0
    filesystem: str = ""  # its kind, such as ext4 or nfs4
    read_bytes_per_s: float | None = None


class Port(Message, frozen=True, kw_only=True):
    """An address that the config wants to listen on. `reason`: why nobody can now; empty if somebody can."""

    field: str
    address: str
    reason: str = ""


class Limits(Message, frozen=True, kw_only=True):
    """Of a process there. None: no limit."""

    num_files: int | None
    num_files_max: int | None  # to which a process may raise it by itself
    memlock_bytes: int | None


class Clock(Message, frozen=True, kw_only=True):
    """A node's clock less that of the driver, give or take `error_s`."""

    offset_s: float
    error_s: float


class NodeFacts(Message, frozen=True, kw_only=True):
    """One machine. Memory is what a process there may have: the machine's, or its container's if less."""

    node: str
    versions: Versions
    cpu: str
    instructions: str  # the best that the native kernels could use: amx, avx512_bf16, avx512, avx2 or ""
    num_cores: int
    memory_bytes: int
    free_bytes: int
    shm_bytes: int  # of /dev/shm
    shm_free_bytes: int
    limits: Limits
    nics: tuple[Nic, ...]
    rdma: tuple[Rdma, ...]
    gpus: tuple[Gpu, ...]
    no_gpus_reason: str
    settings: dict[str, str]  # variables of NCCL and gloo that processes there inherit
    clock: Clock | None = None
    model: ModelOnNode | None = None
    ports: tuple[Port, ...] = ()  # only where the coordinator will be


class Link(Message, frozen=True, kw_only=True):
    """An all-to-all of processes on `nodes`, one on each; twice the same node: two on it. `bytes_per_s`: what
    each sends, while all do. `reason`: why it was not measured."""

    nodes: tuple[str, ...]
    transport: str  # gloo or nccl
    latency_s: float | None = None
    bytes_per_s: float | None = None
    reason: str = ""


class RayNode(Message, frozen=True, kw_only=True):
    """What Ray counts on a node, in all and free."""

    node: str
    total: dict[str, float]
    free: dict[str, float]


class PlacementGroup(Message, frozen=True, kw_only=True):
    """One of Ray's, of any cluster. `state` in Ray's words: PENDING, CREATED, ..."""

    name: str
    state: str
    strategy: str
    bundles: tuple[dict[str, float], ...]


class Silent(Message, frozen=True, kw_only=True):
    """A node that Ray has and that did not answer."""

    node: str
    reason: str


class ClusterFacts(Message, frozen=True, kw_only=True):
    """All of it. Without Ray there is one node, this machine, and `ray_nodes` is None."""

    driver: str  # node of the process that asked; the coordinator will be there
    nodes: tuple[NodeFacts, ...]
    silent: tuple[Silent, ...] = ()
    links: tuple[Link, ...] = ()
    ray_nodes: tuple[RayNode, ...] | None = None
    placement_groups: tuple[PlacementGroup, ...] = ()
